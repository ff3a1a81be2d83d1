"""Logistic regressions solved to convergence, by scikit-learn.

A fit on n rows minimises

    1/n sum_i CE(W x_i + b, y_i) + penalty/2 (|W|^2 + |b|^2)

which is what gradient descent with that weight decay on weights and bias minimises. scikit-learn
penalises no intercept, so the bias is the weight of a column of ones; of two classes it penalises
w_1 - w_0 once, where here both are penalised, which is half as much.

Shape suffixes: N rows, D features, E = D + 1 features and bias, F training sets, R penalties of
each, T rows of a training set, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lowmem_cft.evaluation.transfer.folds import Rows

TOLERANCE = 1e-6
"""Largest element of the gradient, in nats, at which a fit counts as converged."""


def solve_logistic(
    features_ND: Tensor,
    label_N: Tensor,
    train: Sequence[Rows],
    penalty_FR: Tensor,
    num_classes: int,
    *,
    max_iterations: int = 100,
) -> tuple[Tensor, int]:
    """Fit a model per set of training rows and penalty, on the CPU in float64.

    Args:
        features_ND: floating.
        label_N: int64 class numbers.
        train: the row numbers of each set, of at least two classes. A class without rows has the
            weights 0 and is never predicted: the logits of the others add up to 0.
        penalty_FR: greater than 0.
        max_iterations: Newton steps of a fit.

    Returns:
        Weights (F, R, K, E) in float64, bias last, and how many fits were cut off before their
        minimum.
    """
    from sklearn.linear_model import LogisticRegression

    x_NE = functional.pad(features_ND.cpu().double(), (0, 1), value=1.0).numpy()
    labels = label_N.cpu().numpy()
    weight_FRKE = torch.zeros((*penalty_FR.shape, num_classes, x_NE.shape[1]), dtype=torch.float64)
    num_cut_off = 0
    for f, rows in enumerate(train):
        x_TE, label_T = x_NE[rows], labels[rows]
        # it forms no Hessian, which would not fit at large D, and raw states are badly conditioned
        model = LogisticRegression(
            fit_intercept=False,
            solver="newton-cg",
            tol=TOLERANCE,
            max_iter=max_iterations,
            warm_start=True,
        )
        for r in penalty_FR[f].argsort(descending=True).tolist():
            two = len(set(label_T.tolist())) == 2
            penalty = float(penalty_FR[f, r]) / (2 if two else 1)
            with warnings.catch_warnings(record=True) as cut_off:
                warnings.simplefilter("ignore")
                # that there were too few iterations, or that no step lowers the loss
                warnings.simplefilter("always", UserWarning)
                model.set_params(C=1 / (penalty * len(rows))).fit(x_TE, label_T)
            weight_KE = torch.from_numpy(model.coef_)
            if two:
                weight_KE = torch.cat([-weight_KE / 2, weight_KE / 2])
            weight_FRKE[f, r, model.classes_] = weight_KE
            num_cut_off += bool(cut_off)
    return weight_FRKE, num_cut_off
