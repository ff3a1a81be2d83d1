"""Logistic regressions on subsets of the same rows, all solved at once to convergence.

Each model minimises over its subset, n rows,

    1/n sum_i CE(softmax(W x_i + b), y_i) + penalty/2 (|W|^2 + |b|^2)

which is what gradient descent with that weight decay on weights and bias minimises. With two
classes the optimum has w_0 = -w_1, so one vector v = w_1 - w_0 with half the penalty does.

The models share one feature matrix, which is neither copied nor converted whole: membership is a
0/1 weight per row and subset, and a step of L-BFGS (Nocedal and Wright, algorithm 7.4) for all
models of a penalty is two products with that matrix. Its first guess of the Hessian is that of the
models' mean, class by class: they share most of their rows, so it fits them all, and neither the
scale nor the correlation of the features slows it. Penalties are worked off from large to small,
each from the weights of the one before. Arithmetic is in float64.

Shape suffixes: N rows, D features, E = D + 1 features and bias, F subsets, R penalties of each,
M models of one penalty still being solved, C columns of a model (1 of two classes, else one per
class), K classes, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK_ROWS = 2048
_HISTORY = 10
_HESSIAN_EVERY = 10
"""Steps after which the first guess of the Hessian is made anew."""
_HALVINGS = 30
_RIDGE = 1e-14
"""Of a diagonal element, for each row of a Hessian: a hundred times float64's rounding."""
_ROUNDING = 1e-14
"""Of a loss of about 1 in float64, summed over many rows."""


@dataclass(frozen=True)
class Solution:
    """Weights in float64, bias last: logits of x are W[:, :-1] x + W[:, -1].

    `iterations` is the largest number that a penalty took.
    """

    weight_FRKE: Tensor
    converged_FR: Tensor
    iterations: int


def solve_logistic(
    features_ND: Tensor,
    label_N: Tensor,
    member_NF: Tensor,
    penalty_FR: Tensor,
    num_classes: int,
    *,
    tolerance: float = 1e-12,
    max_iterations: int = 500,
) -> Solution:
    """Fit F x R models: of each subset, one per penalty.

    Args:
        features_ND: floating.
        label_N: int64 class numbers.
        member_NF: bool; which rows each subset has, at least one.
        penalty_FR: greater than 0.
        num_classes: at least 2.
        tolerance: a model is solved when its loss is estimated (half the Newton decrement) to be
            this close, in nats, to the minimum.
        max_iterations: of each penalty.

    Raises:
        ValueError: a penalty is not positive: the minimum may then not exist.
    """
    if not bool((penalty_FR > 0).all()):
        raise ValueError(f"L2 penalties: got {penalty_FR.min().item()}, wanted more than 0")
    columns = 1 if num_classes == 2 else num_classes
    weight_EFC = features_ND.new_zeros(
        (features_ND.shape[1] + 1, len(penalty_FR), columns), dtype=torch.float64
    )
    shape = (*penalty_FR.shape, num_classes, len(weight_EFC))
    weight_FRKE = weight_EFC.new_empty(shape)
    converged_FR = torch.zeros_like(penalty_FR, dtype=torch.bool)
    most_iterations = 0
    for penalty in sorted(set(penalty_FR.flatten().tolist()), reverse=True):
        subset_M, which_M = torch.nonzero(penalty_FR == penalty, as_tuple=True)
        halved = penalty / 2 if columns == 1 else penalty
        fit = _Fit(features_ND, label_N, member_NF[:, subset_M], halved, weight_EFC[:, subset_M])
        weight_EMC, converged_M, iterations = _minimise(fit, tolerance, max_iterations)
        weight_EFC[:, subset_M] = weight_EMC
        if columns == 1:
            weight_EMC = torch.cat([-weight_EMC / 2, weight_EMC / 2], dim=2)
        weight_FRKE[subset_M, which_M] = weight_EMC.permute(1, 2, 0)
        converged_FR[subset_M, which_M] = converged_M
        most_iterations = max(most_iterations, iterations)
    return Solution(weight_FRKE, converged_FR, most_iterations)


def _minimise(fit: _Fit, tolerance: float, max_iterations: int) -> tuple[Tensor, Tensor, int]:
    """Weights, whether each model converged, and the number of iterations."""
    weight_EMC = torch.zeros_like(fit.weight_EMC)
    model_M = torch.arange(weight_EMC.shape[1], device=weight_EMC.device)
    converged_M = torch.zeros_like(model_M, dtype=torch.bool)
    iterations = 0
    while len(model_M) and iterations < max_iterations:
        if iterations % _HESSIAN_EVERY == 0:
            fit.guess_hessian()
        iterations += 1
        direction_EMC = fit.direction()
        decrement_M = -_dot(fit.gradient_EMC, direction_EMC)
        solved_M = decrement_M <= 2 * tolerance
        if bool(solved_M.any()):
            weight_EMC[:, model_M[solved_M]] = fit.weight_EMC[:, solved_M]
            converged_M[model_M[solved_M]] = True
            model_M, direction_EMC = model_M[~solved_M], direction_EMC[:, ~solved_M]
            decrement_M = decrement_M[~solved_M]
            fit.keep(~solved_M)
        if len(model_M):
            fit.step(direction_EMC, decrement_M)
    weight_EMC[:, model_M] = fit.weight_EMC
    return weight_EMC, converged_M, iterations


def _dot(a_EMC: Tensor, b_EMC: Tensor) -> Tensor:
    return torch.einsum("emc,emc->m", a_EMC, b_EMC)


class _Fit:
    """Models of one penalty: weights, logits of all rows, gradients and past steps."""

    def __init__(
        self,
        features_ND: Tensor,
        label_N: Tensor,
        member_NM: Tensor,
        penalty: float,
        weight_EMC: Tensor,
    ) -> None:
        self.columns = weight_EMC.shape[2]
        self._features_ND, self._label_N, self._penalty = features_ND, label_N, penalty
        self._member_NM = member_NM
        self._count_M = member_NM.sum(dim=0).double()
        self.weight_EMC = weight_EMC.clone()
        self._logit_NMC = self._product(weight_EMC)
        self._loss_M = self._loss(weight_EMC, self._logit_NMC, self._count_M.new_zeros(()))
        self.gradient_EMC = self._gradient()
        self._past: list[tuple[Tensor, Tensor, Tensor]] = []
        self._factor_CEE = weight_EMC.new_empty(0)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their features with a one for the bias) in float64."""
        for start in range(0, len(self._features_ND), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            x_BD = self._features_ND[rows].double()
            yield rows, torch.cat([x_BD, x_BD.new_ones((len(x_BD), 1))], dim=1)

    def _product(self, weight_EMC: Tensor) -> Tensor:
        """Logits (N, M, C)."""
        num_models = weight_EMC.shape[1]
        logit_NMC = weight_EMC.new_empty((len(self._features_ND), num_models, self.columns))
        for rows, x_BE in self._blocks():
            logit_NMC[rows] = torch.einsum("be,emc->bmc", x_BE, weight_EMC)
        return logit_NMC

    def _probability(self, rows: slice) -> Tensor:
        """Of class 1 of two, else of each class, (B, M, C)."""
        logit_BMC = self._logit_NMC[rows]
        return logit_BMC.sigmoid() if self.columns == 1 else logit_BMC.softmax(dim=2)

    def _share(self, rows: slice) -> Tensor:
        """What a row counts in each model's mean, (B, M)."""
        return self._member_NM[rows] / self._count_M

    def guess_hessian(self) -> None:
        """The mean over the models of each column's own block, as Cholesky factors."""
        size = len(self.weight_EMC)
        hessian_CEE = self.weight_EMC.new_zeros((self.columns, size, size))
        for rows, x_BE in self._blocks():
            p_BMC = self._probability(rows)
            curvature_BMC = p_BMC * (1 - p_BMC) * self._share(rows)[..., None]
            for c, curvature_B in enumerate(curvature_BMC.mean(dim=1).T):
                hessian_CEE[c].addmm_(x_BE.T, curvature_B[:, None] * x_BE)
        diagonal_CE = hessian_CEE.diagonal(dim1=1, dim2=2)
        diagonal_CE.add_(self._penalty)
        self._factor_CEE, failed_C = torch.linalg.cholesky_ex(hessian_CEE)
        if bool(failed_C.any()):
            # The penalty makes it positive definite, but in large features rounding hides that: by
            # no more than a share of each diagonal element (Higham, Accuracy and Stability of
            # Numerical Algorithms, theorem 10.7). A guess need not be exact.
            diagonal_CE.mul_(1 + _RIDGE * size)
            self._factor_CEE = torch.linalg.cholesky(hessian_CEE)

    def _first_guess(self, gradient_EMC: Tensor) -> Tensor:
        """The guessed inverse Hessian times the gradient."""
        solved_CEM = torch.cholesky_solve(gradient_EMC.permute(2, 0, 1), self._factor_CEE)
        if self.columns > 1:
            # at the minimum a model's columns add up to 0, and gradients always do
            solved_CEM -= solved_CEM.mean(dim=0)
        return solved_CEM.permute(1, 2, 0).contiguous()

    def direction(self) -> Tensor:
        """Where L-BFGS goes, (E, M, C)."""
        q_EMC = self.gradient_EMC.clone()
        alphas = []
        for step_EMC, change_EMC, inverse_M in reversed(self._past):
            alpha_M = inverse_M * _dot(step_EMC, q_EMC)
            q_EMC -= alpha_M[:, None] * change_EMC
            alphas.append(alpha_M)
        r_EMC = self._first_guess(q_EMC)
        if self._past:
            _, change_EMC, inverse_M = self._past[-1]
            along_M = inverse_M * _dot(change_EMC, self._first_guess(change_EMC))
            r_EMC /= torch.where(along_M > 0, along_M, 1.0)[:, None]
        for (step_EMC, change_EMC, inverse_M), alpha_M in zip(
            self._past, reversed(alphas), strict=True
        ):
            beta_M = inverse_M * _dot(change_EMC, r_EMC)
            r_EMC += (alpha_M - beta_M)[:, None] * step_EMC
        return -r_EMC

    def step(self, direction_EMC: Tensor, decrement_M: Tensor) -> None:
        """Go along the direction, half as far as often as it takes to decrease the loss."""
        move_NMC = self._product(direction_EMC)
        length_M = torch.ones_like(decrement_M)
        for _ in range(_HALVINGS):
            loss_M = self._loss(direction_EMC, move_NMC, length_M)
            short_M = loss_M > self._loss_M - 1e-4 * length_M * decrement_M + _ROUNDING
            if not bool(short_M.any()):
                break
            length_M = torch.where(short_M, length_M / 2, length_M)
        step_EMC = length_M[:, None] * direction_EMC
        self.weight_EMC += step_EMC
        self._logit_NMC += move_NMC.mul_(length_M[:, None])
        self._loss_M = loss_M
        before_EMC, self.gradient_EMC = self.gradient_EMC, self._gradient()
        change_EMC = self.gradient_EMC - before_EMC
        curvature_M = _dot(step_EMC, change_EMC)
        # positive but for rounding, the loss being strictly convex; 0 makes the pair count nothing
        inverse_M = torch.where(curvature_M > 0, 1 / curvature_M, 0.0)
        self._past = [*self._past[1 - _HISTORY :], (step_EMC, change_EMC, inverse_M)]

    def _loss(self, direction_EMC: Tensor, move_NMC: Tensor, length_M: Tensor) -> Tensor:
        """Of each model, `length_M` along the direction."""
        sum_M = torch.zeros_like(self._count_M)
        for start in range(0, len(self._label_N), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            logit_BMC = self._logit_NMC[rows] + length_M[..., None] * move_NMC[rows]
            label_B1 = self._label_N[rows, None]
            if self.columns == 1:
                loss_BM = functional.softplus(torch.where(label_B1 == 1, -1, 1) * logit_BMC[..., 0])
            else:
                own_BM = logit_BMC.gather(2, label_B1[..., None].expand(-1, len(sum_M), 1))
                loss_BM = logit_BMC.logsumexp(dim=2) - own_BM[..., 0]
            sum_M += (loss_BM * self._member_NM[rows]).sum(dim=0)
        weight_EMC = self.weight_EMC + length_M[..., None] * direction_EMC
        return sum_M / self._count_M + self._penalty / 2 * _dot(weight_EMC, weight_EMC)

    def _gradient(self) -> Tensor:
        gradient_EMC = self._penalty * self.weight_EMC
        for rows, x_BE in self._blocks():
            error_BMC, label_B = self._probability(rows), self._label_N[rows]
            if self.columns == 1:
                error_BMC -= label_B[:, None, None]
            else:
                error_BMC -= functional.one_hot(label_B, self.columns)[:, None]
            error_BMC *= self._share(rows)[..., None]
            gradient_EMC += torch.einsum("be,bmc->emc", x_BE, error_BMC)
        return gradient_EMC

    def keep(self, keep_M: Tensor) -> None:
        """Drop the models that are solved."""
        self._count_M, self._loss_M = self._count_M[keep_M], self._loss_M[keep_M]
        self._member_NM = self._member_NM[:, keep_M]
        self.weight_EMC = self.weight_EMC[:, keep_M]
        self.gradient_EMC = self.gradient_EMC[:, keep_M]
        self._logit_NMC = self._logit_NMC[:, keep_M]
        self._past = [
            (step_EMC[:, keep_M], change_EMC[:, keep_M], inverse_M[keep_M])
            for step_EMC, change_EMC, inverse_M in self._past
        ]
