"""Reports of made-up scores, and the draws that a bootstrap documents."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts.correlation import Floats, spearman
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, Protocol
from lowmem_cft.evaluation.sts.score import ScoredSet, SetScore

MTEB = PROTOCOLS["mteb"]


def drawn_pairs(name: str, num_pairs: int, num_resamples: int, seed: int = 0) -> list[Floats]:
    """The draws that the module documents: numpy's generator, seeded by seed and name."""
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return [draw.integers(0, num_pairs, num_pairs) for _ in range(num_resamples)]


def scores_of(num_pairs: int, seed: int, noise: float, ties: bool) -> tuple[Floats, Floats]:
    draw = np.random.default_rng(seed)
    gold = draw.uniform(0, 5, num_pairs)
    cosine = gold / 5 + noise * draw.normal(size=num_pairs)
    return (gold.round(), cosine.round(1)) if ties else (gold, cosine)


def scored(name: str, gold: Floats, cosine: Floats, sha256: str = "f" * 64) -> ScoredSet:
    score = SetScore(
        name, spearman(cosine, gold), len(gold), len(gold), f"{name}.tsv", 0.5, "sha256:1"
    )
    return ScoredSet(score, cosine, gold, sha256)


def write_report(
    path: Path,
    noise: float,
    names: Sequence[str] = ("STS12", "STS13", "STS14"),
    *,
    protocol: Protocol | None = MTEB,
    cleaned_up: bool = False,
    float32: bool = False,
    sha256: str = "f" * 64,
) -> Path:
    """Sets of 300, 400, ... pairs, of the same gold scores whatever the noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sets = [
        scored(name, *scores_of(300 + 100 * i, i, noise, ties=False), sha256)
        for i, name in enumerate(names)
    ]
    report = eval_report.report(
        f"model {noise}",
        sets,
        protocol=protocol,
        cleaned_up=cleaned_up,
        float32=float32,
        num_resamples=50,
    )
    report.write(path)
    return path
