"""Bootstrap intervals against scipy and against theory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from lowmem_cft.evaluation.sts import bootstrap
from lowmem_cft.evaluation.sts.correlation import spearman
from made_reports import drawn_pairs, scores_of


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
@pytest.mark.parametrize("num_pairs", [10, 400])
def test_every_resample_equals_scipy(num_pairs: int, ties: bool) -> None:
    gold, cosine = scores_of(num_pairs, 1, 0.3, ties)
    if ties and num_pairs == 400:
        assert len(set(gold)) == 6
        assert len(set(cosine)) < 40
    got = bootstrap.resampled_spearman("set", gold, [cosine, -cosine], 50)
    wanted = [
        float(spearmanr(cosine[rows], gold[rows]).statistic)
        for rows in drawn_pairs("set", num_pairs, 50)
    ]
    assert got[0] == pytest.approx(wanted, abs=1e-12)
    assert got[1] == pytest.approx([-value for value in wanted], abs=1e-12)
    assert np.ptp(got[0]) > 0.01


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_ranks_of_any_ties_equal_scipys(pairs: list[tuple[int, int]]) -> None:
    gold, cosine = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    got = bootstrap.resampled_spearman("s", gold, [cosine], 5)[0]
    for value, rows in zip(got, drawn_pairs("s", len(gold), 5), strict=True):
        x, y = rankdata(cosine[rows]), rankdata(gold[rows])
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert value == 0.0
        else:
            assert value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


def test_a_sets_draws_depend_on_name_and_seed_alone() -> None:
    gold, cosine = scores_of(100, 2, 0.3, ties=False)
    first, again = (bootstrap.resampled_spearman("a", gold, [cosine], 20) for _ in range(2))
    assert np.array_equal(first, again)
    assert np.array_equal(first[0], bootstrap.resampled_spearman("a", gold, [gold, cosine], 20)[1])
    assert not np.array_equal(first, bootstrap.resampled_spearman("b", gold, [cosine], 20))
    assert not np.array_equal(first, bootstrap.resampled_spearman("a", gold, [cosine], 20, seed=1))
    with pytest.raises(ValueError, match="resamples: got 0"):
        bootstrap.resampled_spearman("a", gold, [cosine], 0)


def test_interval_is_the_middle_of_the_values() -> None:
    middle = bootstrap.interval(np.arange(1001.0))
    assert (middle.low, middle.high) == pytest.approx((25, 975))


def test_interval_has_the_width_that_theory_gives() -> None:
    """Of a bivariate normal, Fisher's z of Spearman's r has variance about 1.06 / (n - 3).

    Fieller, Hartley and Pearson, Biometrika 44 (1957).
    """
    draw, num_pairs, rho = np.random.default_rng(0), 2000, 0.6
    x = draw.normal(size=num_pairs)
    y = rho * x + np.sqrt(1 - rho**2) * draw.normal(size=num_pairs)
    middle = bootstrap.interval(bootstrap.resampled_spearman("n", x, [y], 1000)[0])
    width = np.arctanh(middle.high) - np.arctanh(middle.low)
    assert width == pytest.approx(2 * 1.96 * np.sqrt(1.06 / (num_pairs - 3)), rel=0.15)
    assert middle.low < spearman(y, x) < middle.high
