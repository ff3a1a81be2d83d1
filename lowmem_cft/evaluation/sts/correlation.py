"""Cosine of embedded pairs, and how well it follows the gold scores.

P: pairs, D: width of an embedding.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import pearsonr, spearmanr

from lowmem_cft.inference.embed import Vectors

Floats = npt.NDArray[np.float64]


def num_not_finite(emb_PD: Vectors) -> int:
    """How many rows have a NaN or an infinity."""
    return int((~np.isfinite(emb_PD).all(axis=1)).sum())


def paired_cosine(emb1_PD: Vectors, emb2_PD: Vectors) -> Floats:
    """float64 (P,): cosine of row i of one with row i of the other; 0 for a zero vector.

    Equal vectors have exactly 1, so that pairs of equal texts are tied and not told apart by
    rounding.
    """
    a_PD, b_PD = emb1_PD.astype(np.float64), emb2_PD.astype(np.float64)
    norms_P = np.linalg.norm(a_PD, axis=1) * np.linalg.norm(b_PD, axis=1)
    cosine_P: Floats = (a_PD * b_PD).sum(axis=1) / np.maximum(norms_P, 1e-12)
    cosine_P[(a_PD == b_PD).all(axis=1) & (norms_P > 0)] = 1
    return cosine_P


def _defined(cosine_P: Floats, gold_P: Floats) -> bool:
    """Collapsed embeddings rank nothing and score 0.

    Raises:
        ValueError: fewer than two pairs, constant gold scores, or a cosine that is no number: no
            correlation is defined.
    """
    num_bad = int((~np.isfinite(cosine_P)).sum())
    if num_bad:
        raise ValueError(f"got {num_bad} of {len(cosine_P)} cosines that are not finite")
    if len(gold_P) < 2 or np.ptp(gold_P) == 0:
        raise ValueError(f"got {len(gold_P)} pairs with constant scores, wanted at least 2 values")
    return bool(np.ptp(cosine_P) > 0)


def spearman(cosine_P: Floats, gold_P: Floats) -> float:
    """Spearman correlation (-1 to 1); errors as in `_defined`."""
    return float(spearmanr(cosine_P, gold_P).statistic) if _defined(cosine_P, gold_P) else 0.0


def pearson(cosine_P: Floats, gold_P: Floats) -> float:
    """Pearson correlation (-1 to 1); errors as in `_defined`."""
    return float(pearsonr(cosine_P, gold_P).statistic) if _defined(cosine_P, gold_P) else 0.0
