"""From log-sum-exps of rows and columns to the loss and to what gradients need of them.

See `problem` for the formulas; L is a pair's log of its softmax's denominator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_cft_kernels.options import Direction
from lowmem_cft_kernels.problem import Block, Problem, add_at


def join(problem: Problem, lse_BP: Tensor | None, lse_R1: Tensor) -> Tensor:
    """(B, P): denominators of pairs with a block's rows added, one row per query or per pair."""
    num_positives = problem.target_MP.shape[1]
    if lse_BP is None:  # the first block has one row per query
        return lse_R1.expand(len(lse_R1), num_positives)
    return torch.logaddexp(lse_BP, lse_R1.reshape(len(lse_BP), -1))


def mean_loss(problem: Problem, queries: slice, lse_BP: Sequence[Tensor]) -> Tensor:
    """These queries' share of the loss, from L of each softmax."""
    weight_BP = problem.weight_MP[queries]
    positive_BP = problem.positive_MP[queries] / problem.temperature
    lse = lse_BP[0] if len(lse_BP) == 1 else torch.stack(list(lse_BP)).mean(dim=0)
    # where weights are 0 a denominator may be empty, its logarithm infinite
    return (weight_BP * (lse - positive_BP).masked_fill_(weight_BP == 0, 0.0)).sum()


def row_share(
    problem: Problem, block: Block, queries: slice, lse_BP: Tensor
) -> tuple[Tensor, Tensor]:
    """(R, 1) shift and (R, 1) factor: exp(z - rho) of `problem` is factor x exp(z - shift).

    Kept apart, because a weight in the exponent would round: a row that sees its positive alone,
    and has no gradient, would have one of 1e-6 of the weight at a logit of 10. Where there is no
    weight the shift is infinite.
    """
    weight_BP = problem.weight_MP[queries] / len(problem.options.softmaxes)
    without_BP = weight_BP == 0
    lse_BP = lse_BP.masked_fill(without_BP, torch.inf)
    if block.direction is Direction.DOC_TO_DOC:
        return lse_BP.reshape(-1, 1), weight_BP.reshape(-1, 1)
    shift_B1 = lse_BP.amin(dim=1, keepdim=True)
    share_BP = weight_BP * torch.exp(shift_B1 - lse_BP)
    return shift_B1, share_BP.masked_fill_(without_BP, 0.0).sum(dim=1, keepdim=True)


def column_share(problem: Problem, lse_MP: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) shift and (N,) factor, the same for exp(z - gamma)."""
    num_docs = len(problem.queries_with_documents.col_CD)
    target, weight = problem.target_MP.flatten(), problem.weight_MP.flatten()
    without = weight == 0
    lse = lse_MP.flatten().masked_fill(without, torch.inf)
    shift_N = lse.new_full((num_docs,), torch.inf)
    shift_N.scatter_reduce_(0, target, lse, "amin")
    share = weight / len(problem.options.softmaxes) * torch.exp(shift_N[target] - lse)
    share.masked_fill_(without, 0.0)
    return shift_N, add_at(torch.zeros_like(shift_N), target, share)


def row_shift(problem: Problem, block: Block, queries: slice, lse_BP: Tensor) -> Tensor:
    """(R, 1), rho of `problem`; infinite where the row has no weight."""
    shift_R1, factor_R1 = row_share(problem, block, queries, lse_BP)
    return shift_R1 - factor_R1.log()


def column_shift(problem: Problem, lse_MP: Tensor) -> Tensor:
    """(N,), gamma of `problem`; infinite for documents that are nobody's positive."""
    shift_N, factor_N = column_share(problem, lse_MP)
    return shift_N - factor_N.log()
