"""Scores of similarity sets against scipy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

from lowmem_cft.evaluation.sts.correlation import Floats, paired_cosine, pearson, spearman
from lowmem_cft.inference.embed import Vectors

Scores = npt.NDArray[np.float64]


def cosine_spearman(emb1_PD: Vectors, emb2_PD: Vectors, gold_P: Floats) -> float:
    return spearman(paired_cosine(emb1_PD, emb2_PD), gold_P)


def make_pairs(num_pairs: int, seed: int, ties: bool) -> tuple[Vectors, Vectors, Scores]:
    """Vectors of many lengths whose cosine follows the gold score, loosely."""
    draw = np.random.default_rng(seed)
    gold = draw.uniform(0, 5, num_pairs)
    if ties:
        gold = np.round(gold)
    first = draw.normal(size=(num_pairs, 8))
    second = first * (gold[:, None] - 2) + 3 * draw.normal(size=(num_pairs, 8))
    if ties:  # pairs that are there twice, the second time with another gold score
        half = num_pairs // 2
        first[half : 2 * half], second[half : 2 * half] = first[:half], second[:half]
    scale = draw.uniform(0.1, 10, (num_pairs, 1)) if not ties else 1.0
    return (first * scale).astype(np.float32), second.astype(np.float32), gold


def cosines(first: Vectors, second: Vectors) -> Scores:
    return np.array(
        [
            np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
            for a, b in zip(first.astype(np.float64), second.astype(np.float64), strict=True)
        ]
    )


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("num_pairs", [2, 10, 501])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_scipy(num_pairs: int, seed: int, ties: bool) -> None:
    first, second, gold = make_pairs(num_pairs, seed, ties)
    wanted = cosines(first, second)
    if ties and num_pairs > 2:
        assert len(set(wanted)) < num_pairs
        assert len(set(gold)) < num_pairs
    if num_pairs == 2 and ties:
        second[1] *= -1  # or the two pairs are one
        wanted[1] *= -1
    got = cosine_spearman(first, second, gold)
    assert got == pytest.approx(float(spearmanr(wanted, gold).statistic), abs=1e-12)
    by_ranks = float(pearsonr(rankdata(wanted), rankdata(gold)).statistic)
    assert got == pytest.approx(by_ranks, abs=1e-12)
    if num_pairs == 501:
        assert 0.1 < got < 0.9


def test_perfect_and_reversed() -> None:
    angle = np.linspace(0.1, 3, 20)
    first = np.tile(np.array([[1.0, 0.0]]), (20, 1)).astype(np.float32)
    second = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    assert cosine_spearman(first, second, -(angle**3)) == pytest.approx(1, abs=1e-15)
    assert cosine_spearman(first, second, angle) == pytest.approx(-1, abs=1e-15)


def test_lengths_of_vectors_do_not_count() -> None:
    first, second, gold = make_pairs(200, 3, ties=False)
    wanted = cosine_spearman(first, second, gold)
    draw = np.random.default_rng(0)
    for _ in range(5):
        scale1, scale2 = (
            (10.0 ** draw.uniform(-3, 3, (200, 1))).astype(np.float32) for _ in range(2)
        )
        assert cosine_spearman(first * scale1, second * scale2, gold) == wanted
    dot = (first * second).sum(axis=1)
    assert float(spearmanr(dot, gold).statistic) != wanted, "the lengths would not matter anyway"


def test_ties_survive_scaling_by_powers_of_two() -> None:
    first, second, gold = make_pairs(200, 4, ties=True)
    scale = (2.0 ** np.random.default_rng(0).integers(-9, 9, (200, 1))).astype(np.float32)
    got = cosine_spearman(first * scale, second, gold)
    assert got == cosine_spearman(first, second, gold)


def test_order_of_pairs_and_of_their_sides_does_not_count() -> None:
    first, second, gold = make_pairs(200, 5, ties=True)
    wanted = cosine_spearman(first, second, gold)
    order = np.random.default_rng(0).permutation(200)
    assert cosine_spearman(first[order], second[order], gold[order]) == pytest.approx(
        wanted, abs=1e-14
    )
    assert cosine_spearman(second, first, gold) == wanted
    assert cosine_spearman(first, second, 2 * gold + 7) == wanted


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3], ids=["all zero", "all one", "all 0.3"])
def test_collapsed_embeddings_score_zero(value: float) -> None:
    same = np.full((10, 8), value, dtype=np.float32)
    assert cosine_spearman(same, same, np.arange(10.0)) == 0.0


def test_a_zero_vector_is_like_nothing() -> None:
    first, second, gold = make_pairs(50, 6, ties=False)
    first[7] = 0
    wanted = cosines(np.delete(first, 7, 0), np.delete(second, 7, 0))
    wanted = np.insert(wanted, 7, 0.0)
    got = cosine_spearman(first, second, gold)
    assert got == pytest.approx(float(spearmanr(wanted, gold).statistic), abs=1e-12)


def test_equal_vectors_are_tied() -> None:
    first, _, _ = make_pairs(500, 8, ties=False)
    a = first.astype(np.float64)
    plain = (a * a).sum(axis=1) / np.linalg.norm(a, axis=1) ** 2
    assert len(set(plain)) > 1, "rounding would tell them apart"
    assert set(paired_cosine(first, first)) == {1.0}
    assert set(paired_cosine(0 * first, 0 * first)) == {0.0}


@pytest.mark.parametrize("num_pairs", [0, 1, 5])
def test_constant_scores(num_pairs: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(num_pairs, 4)).astype(np.float32)
    message = f"got {num_pairs} pairs with constant scores, wanted at least 2 values"
    with pytest.raises(ValueError, match=message):
        cosine_spearman(vectors, vectors, np.full(num_pairs, 2.5))


def test_pearson_equals_scipy_and_collapse_scores_zero() -> None:
    first, second, gold = make_pairs(200, 7, ties=True)
    cosine = paired_cosine(first, second)
    assert cosine == pytest.approx(cosines(first, second), abs=1e-12)
    assert pearson(cosine, gold) == pytest.approx(
        float(pearsonr(cosine, gold).statistic), abs=1e-12
    )
    assert 0.1 < pearson(cosine, gold) < 0.9
    assert pearson(cosine, gold) != spearman(cosine, gold)
    assert pearson(np.full(200, 0.5), gold) == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_cosine_that_is_no_number_has_no_correlation(value: float) -> None:
    gold, cosine = np.arange(4.0), np.array([0.1, value, 0.2, 0.3])
    for correlation in (spearman, pearson):
        with pytest.raises(ValueError, match="1 of 4 cosines that are not finite"):
            correlation(cosine, gold)
