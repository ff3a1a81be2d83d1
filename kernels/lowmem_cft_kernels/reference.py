"""InfoNCE written as its formula: the specification of every other path.

    s_ij = <q_i, d_j> / temperature
    row_i = -log( exp(s_i,t(i)) / sum over visible j of exp(s_ij) )
    loss = mean_i row_i

(van den Oord et al. 2018, arXiv 1807.03748, eq. 4; SimCSE, arXiv 2104.08821, eq. 5 for hard
negatives.) Symmetric adds the other direction: each query's positive document picks its query out
of all queries that see it, and the loss is the mean of both directions. Holds several M x N
matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_cft_kernels.masks import Candidates


def info_nce_loss(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    *,
    temperature: float | Tensor,
    symmetric: bool = False,
) -> Tensor:
    """Mean InfoNCE loss, a scalar that autograd differentiates in all three tensors.

    Args:
        query_MD, doc_ND: (M, D) and (N, D), used as given (normalise them for cosine).
        candidates: positives and visibility.
        temperature: > 0.
        symmetric: also score documents against queries.
    """
    sim_MN = query_MD @ doc_ND.T / temperature
    hidden_MN = candidates.hidden(slice(0, query_MD.shape[0]))
    if hidden_MN is not None:
        sim_MN = sim_MN.masked_fill(hidden_MN, -torch.inf)
    target_M = candidates.target_M
    positive_M = sim_MN.gather(1, target_M[:, None])[:, 0]
    loss = (sim_MN.logsumexp(dim=1) - positive_M).mean()
    if not symmetric:
        return loss
    column_M = sim_MN.logsumexp(dim=0)[target_M]
    return (loss + (column_M - positive_M).mean()) / 2
