"""What both passes collect while they see every similarity once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_cft_kernels.options import Direction
from lowmem_cft_kernels.problem import Problem
from lowmem_cft_kernels.result import Observed


@dataclass
class Tally:
    """Sums over the queries that count; see `Observed.from_sums`.

    Attributes:
        above_M: int64, visible negatives that exceed the query's best positive.
        seen_M: int64, documents (bank included) that the query sees, positives included.
        sum_M: sum of their similarities, before the temperature.
    """

    above_M: Tensor
    seen_M: Tensor
    sum_M: Tensor

    @classmethod
    def empty(cls, problem: Problem) -> Tally:
        """Nothing seen yet."""
        integers_M = torch.zeros_like(problem.counted_M, dtype=torch.int64)
        floats_M = torch.zeros_like(problem.counted_M, dtype=problem.compute)
        return cls(integers_M, integers_M.clone(), floats_M)

    def observed(self, problem: Problem) -> Observed:
        """What the sums say once every similarity has been seen."""
        seen_blocks = (
            block for block in problem.blocks if block.direction is Direction.QUERY_TO_DOC
        )
        num_seeable = sum(len(block.col_CD) for block in seen_blocks)
        there_MP, ignored_M = problem.there_MP, ~problem.counted_M
        counts_M = [problem.counted_M, self.above_M == 0, self.above_M, self.seen_M]
        counts = torch.stack([*counts_M, there_MP.sum(dim=1)]).masked_fill_(ignored_M, 0)
        queries, first, above, seen, positives = counts.sum(dim=1).unbind()
        positive_M = problem.positive_MP.masked_fill(~there_MP, 0.0).sum(dim=1)
        sums = torch.stack([positive_M, self.sum_M]).masked_fill_(ignored_M, 0.0)
        positive_sum, seen_sum = sums.sum(dim=1).unbind()
        return Observed.from_sums(
            queries=queries,
            first=first,
            above=above,
            positives=positives,
            negatives=seen - positives,
            others=queries * num_seeable - positives,
            positive_sum=positive_sum,
            negative_sum=seen_sum - positive_sum,
        )
