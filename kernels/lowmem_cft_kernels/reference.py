"""InfoNCE written as its formulas: the specification of every other path. Holds M x N matrices.

With s_ij = <q_i, d_j> (of unit vectors if `normalize`), each pair of a query i and one of its
positives t has, for each softmax, the loss

    log( sum of exp(s / temperature) over the softmax's visible candidates ) - s_it / temperature

The mean over a query's positives, then the weighted mean over queries, then the mean over
softmaxes is the loss (van den Oord et al., arXiv 1807.03748, eq. 4; several positives as in
Khosla et al., arXiv 2004.11362, eq. 2).

Shape suffixes: M queries, N documents, C bank documents, E = N + C, R pairs, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_cft_kernels.masks import NO_TARGET, Candidates
from lowmem_cft_kernels.options import (
    ONE_WAY,
    Bank,
    Direction,
    FalseNegatives,
    Hardness,
    Negatives,
    Softmax,
)
from lowmem_cft_kernels.result import Observed


def reference_loss(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    *,
    temperature: float | Tensor,
    softmaxes: Sequence[Softmax] = ONE_WAY,
    false_negatives: FalseNegatives | None = None,
    hardness: Hardness | None = None,
    weight_M: Tensor | None = None,
    bank: Bank | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Observed]:
    """The loss, a scalar that autograd differentiates, and what was observed; see `info_nce`."""
    num_queries, num_docs = len(query_MD), len(doc_ND)
    bank_CD = doc_ND[:0] if bank is None else bank.doc_CD.detach()
    if normalize:
        query_MD, doc_ND, bank_CD = (F.normalize(x, dim=1) for x in (query_MD, doc_ND, bank_CD))
    sim_ME = query_MD @ torch.cat([doc_ND, bank_CD]).T
    sim_MM, sim_NN = query_MD @ query_MD.T, doc_ND @ doc_ND.T

    # the pairs: query i_R with its positive document t_R
    there_MP = candidates.target_MP != NO_TARGET
    i_R, t_R = there_MP.nonzero()[:, 0], candidates.target_MP[there_MP]
    num_positives_M = there_MP.sum(dim=1)
    weight_M = sim_ME.new_ones(num_queries) if weight_M is None else weight_M.to(sim_ME)
    weight_R = (weight_M / num_positives_M)[i_R]
    weight_R = weight_R / weight_R.sum().clamp(min=torch.finfo(weight_R.dtype).tiny)

    # who is hidden from whom
    positive_ME = torch.zeros_like(sim_ME, dtype=torch.bool)
    positive_ME[i_R, t_R] = True
    own_ME = torch.zeros_like(positive_ME)
    hidden_ME = torch.zeros_like(positive_ME)
    index_M1 = torch.arange(num_queries, device=query_MD.device)[:, None]
    if candidates.owner_N is not None:
        own_ME[:, :num_docs] = candidates.owner_N == index_M1
        if candidates.own_only:
            hidden_ME[:, :num_docs] = (candidates.owner_N >= 0) & ~own_ME[:, :num_docs]
    hidden_MM = index_M1 == index_M1.T
    hidden_NN = torch.zeros_like(sim_NN, dtype=torch.bool)
    key_MK, key_N = candidates.query_key_MK, candidates.doc_keys
    if key_MK is not None and key_N is not None:
        hidden_ME[:, :num_docs] |= (key_MK[:, None, :] == key_N[:, None]).any(dim=2)
        hidden_MM = hidden_MM | (key_MK[:, None, :, None] == key_MK[:, None, :]).any(-1).any(-1)
        hidden_NN = key_N[:, None] == key_N
        if bank is not None and bank.keys_C is not None:
            hidden_ME[:, num_docs:] |= (key_MK[:, None, :] == bank.keys_C[:, None]).any(dim=2)
    hidden_NM = hidden_ME[:, :num_docs].T.clone()
    hidden_RN = hidden_NN[t_R] | own_ME[i_R, :num_docs] | positive_ME[i_R, :num_docs]
    if false_negatives is not None:
        guide_ME, guide_MM, guide_NN = sim_ME.detach(), sim_MM.detach(), sim_NN.detach()
        if false_negatives.guided:
            assert false_negatives.query_guide_MG is not None
            assert false_negatives.doc_guide_NG is not None
            bank_guide = [bank.guide_CG] if bank is not None and bank.guide_CG is not None else []
            seen_EG = torch.cat([false_negatives.doc_guide_NG, *bank_guide])
            query_MG = F.normalize(false_negatives.query_guide_MG.to(sim_ME.dtype), dim=1)
            seen_EG = F.normalize(seen_EG.to(sim_ME.dtype), dim=1)
            guide_ME, guide_MM = query_MG @ seen_EG.T, query_MG @ query_MG.T
            guide_NN = seen_EG[:num_docs] @ seen_EG[:num_docs].T
        best_M = guide_ME.masked_fill(~positive_ME, -torch.inf).amax(dim=1)
        scale_M = best_M.abs() if false_negatives.relative else 1.0
        bound_M = best_M - scale_M * false_negatives.margin
        bound_N = bound_M.new_full((num_docs,), -torch.inf)
        bound_N = bound_N.scatter_reduce(0, t_R, bound_M[i_R], "amax")
        hidden_ME |= guide_ME > bound_M[:, None]
        hidden_NM |= (guide_ME[:, :num_docs] > bound_N).T
        hidden_MM |= guide_MM > bound_M[:, None]
        hidden_RN |= guide_NN[t_R] > bound_M[i_R, None]
    hidden_ME &= ~positive_ME
    hidden_NM &= ~positive_ME[:, :num_docs].T

    # logits of each pair's candidates, by direction
    logit_ME = sim_ME / temperature
    if hardness is not None:
        weighted_ME = {
            Negatives.HARD: own_ME,
            Negatives.IN_BATCH: ~own_ME,
            Negatives.ALL: torch.ones_like(own_ME),
        }[hardness.on]
        extra_ME = hardness.strength * sim_ME.detach()
        logit_ME = logit_ME + extra_ME.masked_fill(positive_ME | ~weighted_ME, 0.0)
    logits = {
        Direction.QUERY_TO_DOC: logit_ME.masked_fill(hidden_ME, -torch.inf)[i_R],
        Direction.DOC_TO_QUERY: (sim_ME.T[:num_docs] / temperature).masked_fill(
            hidden_NM, -torch.inf
        )[t_R],
        Direction.QUERY_TO_QUERY: (sim_MM / temperature).masked_fill(hidden_MM, -torch.inf)[i_R],
        Direction.DOC_TO_DOC: (sim_NN[t_R] / temperature).masked_fill(hidden_RN, -torch.inf),
    }
    loss_R = -sim_ME[i_R, t_R] / temperature
    for softmax in softmaxes:
        visible = torch.cat([logits[direction] for direction in sorted(softmax)], dim=1)
        loss_R = loss_R + visible.logsumexp(dim=1) / len(softmaxes)

    counted_M1 = ((num_positives_M > 0) & (weight_M > 0))[:, None]
    observed = Observed.from_matrices(
        sim_ME.detach(), positive_ME & counted_M1, ~hidden_ME & ~positive_ME & counted_M1
    )
    return (weight_R * loss_R).sum(), observed
