"""How far a score could have come out otherwise: percentile intervals over resampled pairs.

A set's pairs are drawn with replacement, as many as there are, and the correlation is computed
anew, with ranks taken within the resample and ties averaged (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, ch. 13). The mean over sets is resampled set by set (stratified). The same
draws serve every model, so that the difference of two is a paired one.

P: pairs, U: distinct values, B: resamples, M: models.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowmem_cft.evaluation.sts.correlation import Floats

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Interval:
    """Bounds of a correlation or a difference of two."""

    low: float
    high: float


class _Ranked:
    """Values whose ranks within a resample follow from how often each pair was drawn."""

    def __init__(self, values_P: Floats) -> None:
        distinct_U, self.place_P = np.unique(values_P, return_inverse=True)
        self.num_distinct = len(distinct_U)

    def centred_ranks(self, times_P: Floats, num_drawn: int) -> Floats:
        """float64 (P,): the rank of each pair's value among those drawn, less the mean rank.

        The n equal values that follow c smaller ones all have the rank c + (n + 1) / 2.
        """
        times_U = np.bincount(self.place_P, weights=times_P, minlength=self.num_distinct)
        ranks_U = np.cumsum(times_U) - (times_U - 1) / 2
        centred_P: Floats = (ranks_U - (num_drawn + 1) / 2)[self.place_P]
        return centred_P


def _spearman(x_P: Floats, y_P: Floats, times_P: Floats) -> float:
    """Pearson correlation of centred ranks; 0 where a resample has one value only."""
    covariance = times_P @ (x_P * y_P)
    scale = np.sqrt((times_P @ (x_P * x_P)) * (times_P @ (y_P * y_P)))
    return float(covariance / scale) if scale > 0 else 0.0


def resampled_spearman(
    name: str,
    gold_P: Floats,
    cosines_MP: Sequence[Floats],
    num_resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Floats:
    """Spearman of each model in each resample.

    Args:
        name: the set's; with the seed it fixes the draws, whatever other sets there are.

    Returns:
        float64 (M, B).

    Raises:
        ValueError: fewer than one resample.
    """
    if num_resamples < 1:
        raise ValueError(f"resamples: got {num_resamples}, wanted at least 1")
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    num_pairs = len(gold_P)
    gold, models = _Ranked(gold_P), [_Ranked(cosine_P) for cosine_P in cosines_MP]
    scores_MB = np.empty((len(models), num_resamples))
    for b in range(num_resamples):
        drawn_P = draw.integers(0, num_pairs, num_pairs)
        times_P = np.bincount(drawn_P, minlength=num_pairs).astype(np.float64)
        y_P = gold.centred_ranks(times_P, num_pairs)
        for m, model in enumerate(models):
            scores_MB[m, b] = _spearman(model.centred_ranks(times_P, num_pairs), y_P, times_P)
    return scores_MB


def interval(values_B: Floats, level: float = LEVEL) -> Interval:
    """The middle `level` of resampled values."""
    tail = 50 * (1 - level)
    low, high = np.percentile(values_B, [tail, 100 - tail])
    return Interval(float(low), float(high))


def describe(num_resamples: int) -> dict[str, object]:
    """What an interval was made with, for the record."""
    return {"resamples": num_resamples, "level": LEVEL, "seed": SEED, "kind": "percentile"}
