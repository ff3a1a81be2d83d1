"""What the loss gives back: value, gradients and what the similarities say of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_cft_kernels.options import LossPath


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the similarities say of a batch: scalars over the queries that count.

    A query counts that has a positive and a weight above 0. Similarities are those of queries with
    documents and the bank, before the temperature and without hardness. NaN where nothing counts.

    Attributes:
        accuracy: share of queries whose best positive no visible negative exceeds.
        mean_rank: of the best positive: 1 + visible negatives that exceed it, in the mean.
        masked_share: hidden share of the documents that are not the query's positives.
        mean_positive: mean similarity of positives.
        mean_negative: mean similarity of visible negatives.
    """

    accuracy: Tensor
    mean_rank: Tensor
    masked_share: Tensor
    mean_positive: Tensor
    mean_negative: Tensor

    @classmethod
    def from_matrices(cls, sim_ME: Tensor, positive_ME: Tensor, negative_ME: Tensor) -> Observed:
        """Sum over M x E matrices, whose masks are empty in rows of queries that do not count.

        `positive_ME` marks positives, `negative_ME` visible negatives.
        """
        best_M1 = sim_ME.masked_fill(~positive_ME, -torch.inf).amax(dim=1, keepdim=True)
        counted_M = positive_ME.any(dim=1)
        above_M = ((sim_ME > best_M1) & negative_ME).sum(dim=1)
        return cls.from_sums(
            queries=counted_M.sum(),
            first=((above_M == 0) & counted_M).sum(),
            above=above_M.sum(),
            positives=positive_ME.sum(),
            negatives=negative_ME.sum(),
            others=counted_M.sum() * sim_ME.shape[1] - positive_ME.sum(),
            positive_sum=sim_ME.masked_fill(~positive_ME, 0.0).sum(),
            negative_sum=sim_ME.masked_fill(~negative_ME, 0.0).sum(),
        )

    @classmethod
    def from_sums(
        cls,
        *,
        queries: Tensor,
        first: Tensor,
        above: Tensor,
        positives: Tensor,
        negatives: Tensor,
        others: Tensor,
        positive_sum: Tensor,
        negative_sum: Tensor,
    ) -> Observed:
        """Divide counts and sums over a batch.

        Args:
            queries: that count; first: of them, those whose best positive is exceeded by none.
            above: visible negatives that exceed their query's best positive.
            positives, negatives: pairs that are positive, pairs that are visible negatives.
            others: pairs that are no positives, hidden or not.
            positive_sum, negative_sum: of similarities.
        """
        return cls(
            accuracy=first / queries,
            mean_rank=1 + above / queries,
            masked_share=(others - negatives) / others,
            mean_positive=positive_sum / positives,
            mean_negative=negative_sum.masked_fill(negatives == 0, torch.nan) / negatives,
        )


@dataclass(frozen=True, kw_only=True)
class InfoNCEResult:
    """Value and gradients; float32 (float64 for float64 inputs).

    Attributes:
        loss: scalar.
        d_query_MD, d_doc_ND: (M, D), (N, D).
        d_temperature: scalar, the derivative with respect to the temperature itself.
        observed: see `Observed`.
        path: how it was computed.
    """

    loss: Tensor
    d_query_MD: Tensor
    d_doc_ND: Tensor
    d_temperature: Tensor
    observed: Observed
    path: LossPath
