"""Score an encoder on STS sets: read the pairs, embed their sentences once, correlate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lowmem_cft.encoder import Encoder
from lowmem_cft.inference import embed_texts
from lowmem_cft.rows import ScoredPair, read_scored_pairs
from lowmem_cft.sts import SETS, cosine_spearman, find_set
from lowmem_cft.tokens import TextFormat, Tokenizer

PROTOCOL = "cosine Spearman over all pairs of the set (mteb)"


@dataclass(frozen=True)
class SetScore:
    """`spearman` is -1 to 1; `num_pairs` counts the pairs scored, of `set_pairs` in the protocol."""

    name: str
    spearman: float
    num_pairs: int
    set_pairs: int | None
    source: str


@dataclass(frozen=True)
class LoadedSet:
    name: str
    pairs: list[ScoredPair]
    set_pairs: int | None
    source: str


def data_folder() -> Path | None:
    """`$LOWMEM_CFT_DATA`, if set.

    Raises:
        ValueError: it names no folder.
    """
    given = os.environ.get("LOWMEM_CFT_DATA")
    if not given:
        return None
    if not Path(given).is_dir():
        raise ValueError(f"LOWMEM_CFT_DATA: no such folder: {given}")
    return Path(given)


def load_set(
    name: str, folder: Path | None, limit: int | None = None, *, offline: bool = False
) -> LoadedSet:
    """Read a set's pairs, the first `limit` if given.

    Without a data folder, sets that the hub has under a plain licence are read from there.

    Raises:
        ValueError: it is not there, a row is wrong, or its size is not the protocol's.
    """
    known = SETS.get(name)
    if folder is None and known is not None and known.hub is not None and not offline:
        source, split = known.hub
        pairs, _ = read_scored_pairs(source, split=split)
        set_pairs = known.num_pairs
    else:
        file, set_pairs = find_set(name, folder)
        pairs, _ = read_scored_pairs(str(file))
        source = file.name
    if set_pairs is not None and len(pairs) != set_pairs:
        raise ValueError(f"{source}: got {len(pairs)} pairs, {name} has {set_pairs}")
    return LoadedSet(name, pairs[:limit], set_pairs, source)


def score_set(
    encoder: Encoder,
    tokenizer: Tokenizer,
    loaded: LoadedSet,
    text_format: TextFormat,
    token_budget: int,
) -> SetScore:
    """Spearman of the set's cosine similarities under the encoder."""
    pairs = loaded.pairs
    texts = [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs]
    vectors = embed_texts(encoder, tokenizer, texts, text_format, token_budget=token_budget)
    gold = np.array([pair.score for pair in pairs], dtype=np.float64)
    spearman = cosine_spearman(vectors[: len(pairs)], vectors[len(pairs) :], gold)
    return SetScore(loaded.name, spearman, len(pairs), loaded.set_pairs, loaded.source)


def as_json(scores: Sequence[SetScore]) -> dict[str, object]:
    """Scores with the protocol's name beside them."""
    mean = float(np.mean([score.spearman for score in scores])) if scores else None
    return {"protocol": PROTOCOL, "mean": mean, "sets": [asdict(score) for score in scores]}
