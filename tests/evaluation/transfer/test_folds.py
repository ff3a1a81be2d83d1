"""Who trains, who chooses and who tests."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lowmem_cft.evaluation.transfer.folds import plan_fits

DRAW = np.random.default_rng(0)


def labels(size: int) -> np.ndarray:
    return DRAW.integers(0, 2, size)


def test_nested_folds_keep_the_test_rows_out() -> None:
    plan = plan_fits({"all": labels(100)}, 4, 1111)
    assert plan.final is not None
    assert len(plan.test) == len(plan.final) == 4
    assert len(plan.train) == len(plan.dev) == 16
    assert sorted(np.concatenate(plan.test)) == list(range(100))
    for i, (final, test) in enumerate(zip(plan.final, plan.test, strict=True)):
        assert sorted([*final, *test]) == list(range(100))
        own = slice(4 * i, 4 * i + 4)
        assert sorted(np.concatenate(plan.dev[own])) == sorted(final)
        for train, dev in zip(plan.train[own], plan.dev[own], strict=True):
            assert sorted([*train, *dev]) == sorted(final)


def test_folds_of_train() -> None:
    given = {"train": labels(60), "test": labels(30)}
    plan = plan_fits(given, 3, 1111)
    assert plan.final is not None
    assert [rows.tolist() for rows in plan.final] == [list(range(60))]
    assert [rows.tolist() for rows in plan.test] == [list(range(60, 90))]
    assert sorted(np.concatenate(plan.dev)) == list(range(60))
    for train, dev in zip(plan.train, plan.dev, strict=True):
        assert sorted([*train, *dev]) == list(range(60))
    other = plan_fits(given, 3, 1)
    assert any((a.tolist() != b.tolist()) for a, b in zip(plan.dev, other.dev, strict=True))


def test_given_splits() -> None:
    plan = plan_fits({"train": labels(5), "dev": labels(3), "test": labels(2)}, 10, 1111)
    sets = (plan.train, plan.dev, plan.test)
    assert [rows.tolist() for (rows,) in sets] == [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]
    assert plan.final is None


def test_a_rare_class_is_refused() -> None:
    label_N = np.array([0] * 50 + [1] * 4)
    with pytest.raises(ValueError, match=r"least populated class .* Take more rows"):
        plan_fits({"all": label_N}, 5, 1111)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'lowmem-cft\[transfer\]'"):
        plan_fits({"all": labels(100)}, 5, 1111)
