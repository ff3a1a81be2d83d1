"""Semantic textual similarity: which sets there are, where their files lie, how they are scored.

Protocol: Spearman correlation of cosine similarity with the gold score, over all pairs of a set at
once (mteb's, and SimCSE's "all"; averaging over subsets gives other numbers).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

DEMO_PAIRS = Path(str(resources.files("lowmem_cft") / "data" / "sts_pairs.tsv"))


@dataclass(frozen=True)
class StsSet:
    """A set and the files, relative to the data folder, that may hold it; the first found counts."""

    name: str
    files: tuple[str, ...]
    num_pairs: int | None
    """As the protocol has it; None where the protocol fixes none."""
    hub: tuple[str, str] | None = None
    """Data set and split on the hub, for when there is no data folder."""


def _mteb(
    name: str, num_pairs: int, folder: str | None = None, hub: tuple[str, str] | None = None
) -> StsSet:
    folder = folder or name
    return StsSet(name, (f"{folder}/{name}.mteb.tsv", f"{folder}/{name}.tsv"), num_pairs, hub)


SETS = {
    entry.name: entry
    for entry in (
        _mteb("STS12", 3108),
        _mteb("STS13", 1500),
        _mteb("STS14", 3750),
        _mteb("STS15", 3000),
        _mteb("STS16", 1186),
        StsSet("STS17", ("STS17/STS17-en-en.tsv",), 250),
        _mteb("STSBenchmark-test", 1379, "STSBenchmark", ("sentence-transformers/stsb", "test")),
        _mteb(
            "STSBenchmark-dev", 1500, "STSBenchmark", ("sentence-transformers/stsb", "validation")
        ),
        _mteb("SICK-R", 9927),
        _mteb("BIOSSES", 100),
    )
}


def find_set(name: str, folder: Path | None) -> tuple[Path, int | None]:
    """The file of a set, and its number of pairs where the protocol fixes it.

    Args:
        name: a key of `SETS`, `demo` for the embedded pairs, or a file of scored pairs.
        folder: the data folder.

    Raises:
        ValueError: no such set, or no file of it; the message says where it was looked for.
    """
    if name == "demo":
        return DEMO_PAIRS, None
    if name not in SETS:
        if Path(name).is_file():
            return Path(name), None
        raise ValueError(f"eval set {name!r}: no such file, and none of {', '.join(SETS)} or demo")
    if folder is None:
        raise ValueError(
            f"eval set {name}: set LOWMEM_CFT_DATA to the folder that holds {SETS[name].files[-1]}"
        )
    for candidate in SETS[name].files:
        if (folder / candidate).is_file():
            return folder / candidate, SETS[name].num_pairs
    raise ValueError(f"eval set {name}: none of {', '.join(SETS[name].files)} in {folder}")


def sets_in(folder: Path) -> list[str]:
    """Names of the sets that the folder holds."""
    return [
        name
        for name, entry in SETS.items()
        if any((folder / file).is_file() for file in entry.files)
    ]


def cosine_spearman(
    emb1_PD: npt.NDArray[np.float32],
    emb2_PD: npt.NDArray[np.float32],
    gold_P: npt.NDArray[np.float64],
) -> float:
    """Spearman correlation (-1 to 1) of row-wise cosine similarity with the gold scores.

    Raises:
        ValueError: fewer than two pairs, or constant scores: no correlation is defined.
    """
    if len(gold_P) < 2 or np.ptp(gold_P) == 0:
        raise ValueError(f"got {len(gold_P)} pairs with constant scores, wanted at least 2 values")
    a_PD, b_PD = emb1_PD.astype(np.float64), emb2_PD.astype(np.float64)
    norms_P = np.linalg.norm(a_PD, axis=1) * np.linalg.norm(b_PD, axis=1)
    cosine_P = (a_PD * b_PD).sum(axis=1) / np.maximum(norms_P, 1e-12)
    if np.ptp(cosine_P) == 0:
        return 0.0  # collapsed embeddings rank nothing; mteb scores them so too
    return float(spearmanr(cosine_P, gold_P).statistic)
