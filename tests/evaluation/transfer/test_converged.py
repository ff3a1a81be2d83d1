"""Fits that are solved to convergence, against the objective that the module states."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem_cft.evaluation.transfer.converged import solve_logistic

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


def overlapping(num_classes: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Classes that overlap, along correlated features of very different lengths."""
    draw = np.random.default_rng(num_classes)
    lengths = np.logspace(-2, 1, 20)
    centre_KD = draw.normal(size=(num_classes, 20)) * 0.4 * lengths
    label_N = draw.integers(0, num_classes, 600)
    noise_ND = draw.normal(size=(600, 20)) * lengths
    noise_ND[:, 1:] += 0.5 * noise_ND[:, :-1]
    features_ND = scale * (centre_KD[label_N] + noise_ND) + 0.3
    return torch.tensor(features_ND, dtype=torch.float32), torch.tensor(label_N)


def subsets() -> list[npt.NDArray[np.int64]]:
    draw = np.random.default_rng(9)
    return [np.flatnonzero(draw.random(600) < share) for share in (0.5, 0.8)]


def gap_bound(x_TD: Tensor, label_T: Tensor, penalty: float, weight_KE: Tensor) -> float:
    """How far the stated objective is at most from its minimum: |gradient|^2 / (2 penalty)."""
    weight_KE = weight_KE.clone().requires_grad_()
    logit_TK = x_TD.double() @ weight_KE[:, :-1].T + weight_KE[:, -1]
    entropy = functional.cross_entropy(logit_TK, label_T)
    (entropy + penalty / 2 * weight_KE.square().sum()).backward()
    assert weight_KE.grad is not None
    return float(weight_KE.grad.square().sum()) / (2 * penalty)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_stated_objective_is_at_its_minimum(num_classes: int, scale: float) -> None:
    """Each set has its penalties in an order of its own."""
    features_ND, label_N = overlapping(num_classes, scale)
    penalty_FR = torch.tensor([PENALTIES, PENALTIES[::-1]])
    weight_FRKE, num_cut_off = solve_logistic(
        features_ND, label_N, subsets(), penalty_FR, num_classes
    )
    assert num_cut_off == 0
    for f, rows in enumerate(subsets()):
        for r in range(len(PENALTIES)):
            x_TD, label_T, penalty = features_ND[rows], label_N[rows], float(penalty_FR[f, r])
            assert gap_bound(x_TD, label_T, penalty, weight_FRKE[f, r]) < 1e-6
            assert gap_bound(x_TD, label_T, penalty, 0 * weight_FRKE[f, r]) > 1e-2


def test_a_fit_cut_off_is_counted() -> None:
    features_ND, label_N = overlapping(2)
    penalty_FR = torch.tensor([PENALTIES] * 2)
    weight_FRKE, num_cut_off = solve_logistic(
        features_ND, label_N, subsets(), penalty_FR, 2, max_iterations=1
    )
    assert num_cut_off == 8
    assert weight_FRKE.abs().amax(dim=(2, 3)).min() > 0  # where it got to


def test_a_class_without_rows_is_never_predicted() -> None:
    features_ND, label_N = overlapping(3)
    rows = np.flatnonzero(label_N.numpy() != 1)
    weight_FRKE, _ = solve_logistic(features_ND, label_N, [rows], torch.tensor([[1e-3]]), 3)
    logit_NK = features_ND.double() @ weight_FRKE[0, 0, :, :-1].T + weight_FRKE[0, 0, :, -1]
    assert set(logit_NK.argmax(dim=1).tolist()) == {0, 2}
