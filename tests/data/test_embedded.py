"""The embedded data: enough of it, valid, varied, and without repetition."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.stats import spearmanr

from lowmem_cft.data.corpus import DEMO_TRIPLETS
from lowmem_cft.data.rows import read_scored_pairs, read_training_rows
from lowmem_cft.evaluation.sts.protocols import DEMO_PAIRS


def test_triplets() -> None:
    rows, report = read_training_rows(str(DEMO_TRIPLETS))
    assert len(rows) >= 400
    assert not report.skipped
    assert all(len(row.negatives) == 1 for row in rows)
    texts = [t for row in rows for t in (row.anchor, row.positive, *row.negatives)]
    assert len(set(texts)) == len(texts)
    openings = Counter(" ".join(row.anchor.split()[:2]).lower() for row in rows)
    assert max(openings.values()) <= 8, openings.most_common(3)
    words = [len(row.anchor.split()) for row in rows]
    assert np.percentile(words, 10) < 7
    assert np.percentile(words, 90) > 18


def test_negatives_are_not_given_away_by_negation() -> None:
    rows, _ = read_training_rows(str(DEMO_TRIPLETS))
    marks = {"not", "no", "never", "nobody", "nothing", "none", "without"}

    def share(texts: list[str]) -> float:
        return float(np.mean([bool(marks & set(text.lower().split())) for text in texts]))

    negatives, positives = [row.negatives[0] for row in rows], [row.positive for row in rows]
    assert share(negatives) < 0.4
    assert share(positives) > 0.1


def test_pairs() -> None:
    pairs, _ = read_scored_pairs(str(DEMO_PAIRS))
    assert len(pairs) >= 150
    scores = np.array([pair.score for pair in pairs])
    assert scores.min() >= 0
    assert scores.max() <= 5
    assert np.histogram(scores, bins=5, range=(0, 5))[0].min() >= 20
    overlap = []
    for pair in pairs:
        a, b = (set(text.lower().split()) for text in (pair.sentence1, pair.sentence2))
        overlap.append(len(a & b) / len(a | b))
    assert abs(spearmanr(overlap, scores).statistic) < 0.45, "counting common words does too well"
