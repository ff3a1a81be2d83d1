"""What both passes collect while they see every similarity once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def observed(self, problem: Problem, num_seeable: int) -> Observed:
        """In the end; `num_seeable`: documents and bank together."""
        counted_M = problem.counted_M
        counted_MP = problem.there_MP & counted_M[:, None]
        positive_sum = problem.positive_MP.masked_fill(~counted_MP, 0.0).sum()
        num_positives = counted_MP.sum()
        queries = counted_M.sum()
        above_M = self.above_M.masked_fill(~counted_M, 0)
        return Observed.from_sums(
            queries=queries,
            first=((above_M == 0) & counted_M).sum(),
            above=above_M.sum(),
            positives=num_positives,
            negatives=self.seen_M.masked_fill(~counted_M, 0).sum() - num_positives,
            others=queries * num_seeable - num_positives,
            positive_sum=positive_sum,
            negative_sum=self.sum_M.masked_fill(~counted_M, 0.0).sum() - positive_sum,
        )
