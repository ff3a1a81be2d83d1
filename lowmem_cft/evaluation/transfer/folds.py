"""Which rows of a transfer task train, choose the penalty and test: SentEval's three schemes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FitPlan:
    """Sets of row numbers, those of one split after those of the other.

    Every set of `test` has its share of `train` and `dev`, in the same order: fits on those choose
    the penalty. A fit on its set of `final` with that penalty is tested; where `final` is None, the
    fit on its only training set is.
    """

    train: list[Rows]
    dev: list[Rows]
    final: list[Rows] | None
    test: list[Rows]


def plan_fits(labels: Mapping[str, npt.NDArray[np.int64]], folds: int, seed: int) -> FitPlan:
    """Nested folds of `all`, folds of `train` beside `test`, or `train`, `dev` and `test`.

    Args:
        labels: class numbers of each split.

    Raises:
        ValueError: scikit-learn is missing, or a class has fewer rows than there are folds.
    """
    rows, start = {}, 0
    for name, label_N in labels.items():
        rows[name] = np.arange(start, start := start + len(label_N))
    all_labels_N = np.concatenate(list(labels.values()))
    if "dev" in rows:
        return FitPlan([rows["train"]], [rows["dev"]], None, [rows["test"]])
    if "test" in rows:
        inner = _folds(rows["train"], all_labels_N, folds, seed)
        final, test = [rows["train"]], [rows["test"]]
    else:
        outer = _folds(rows["all"], all_labels_N, folds, seed)
        final, test = [rest for rest, _ in outer], [fold for _, fold in outer]
        inner = [pair for rest in final for pair in _folds(rest, all_labels_N, folds, seed)]
    return FitPlan([rest for rest, _ in inner], [fold for _, fold in inner], final, test)


def check_scikit_learn() -> None:
    """Raise ValueError where scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ValueError(
            "transfer tasks need scikit-learn, which is not here: "
            "pip install 'lowmem-cft[transfer]'"
        ) from None


def _folds(
    rows: Rows, label_N: npt.NDArray[np.int64], folds: int, seed: int
) -> list[tuple[Rows, Rows]]:
    """(the rest, the fold) for each stratified fold of these rows."""
    check_scikit_learn()
    from sklearn.model_selection import StratifiedKFold

    kfold = StratifiedKFold(folds, shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings():
            # "the least populated class ...": folds without a class are not the protocol's
            warnings.simplefilter("error", UserWarning)
            splits = list(kfold.split(np.zeros(len(rows)), label_N[rows]))
    except (ValueError, UserWarning) as error:
        raise ValueError(f"{error} Take more rows: a greater limit, or none.") from None
    return [(rows[rest], rows[fold]) for rest, fold in splits]
