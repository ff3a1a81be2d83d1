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

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem_cft_kernels.masks import NO_TARGET, Candidates
from lowmem_cft_kernels.options import (
    Bank,
    Direction,
    FalseNegatives,
    Hardness,
    LossOptions,
    Negatives,
)
from lowmem_cft_kernels.result import Observed


def reference_loss(
    query_MD: Tensor, doc_ND: Tensor, candidates: Candidates, options: LossOptions
) -> tuple[Tensor, Observed]:
    """The loss, a scalar that autograd differentiates, and what was observed.

    Arguments as in `info_nce`; of the options, those of how the loss is computed do not count.
    """
    batch = _Batch.of(query_MD, doc_ND, candidates, options)
    hidden = _hidden_by_vectors(batch, candidates, options.bank)
    if options.false_negatives is not None:
        _hide_false_negatives(hidden, batch, options.false_negatives, options.bank)
    hidden.query_doc_ME &= ~batch.positive_ME
    hidden.doc_query_NM &= ~batch.positive_ME[:, : len(doc_ND)].T

    sim_ME, i_R, t_R = batch.sim_ME, batch.i_R, batch.t_R
    logits = _logits(batch, hidden, options.temperature, options.hardness)
    loss_R = -sim_ME[i_R, t_R] / options.temperature
    for softmax in options.softmaxes:
        visible = torch.cat([logits[direction] for direction in sorted(softmax)], dim=1)
        loss_R = loss_R + visible.logsumexp(dim=1) / len(options.softmaxes)

    # a query's weight is shared by its positives, and all weights sum to 1
    num_positives_M = (candidates.target_MP != NO_TARGET).sum(dim=1)
    weight_M = sim_ME.new_ones(len(query_MD))
    if options.weight_M is not None:
        weight_M = options.weight_M.to(sim_ME)
    weight_R = (weight_M / num_positives_M)[i_R]
    weight_R = weight_R / weight_R.sum().clamp(min=torch.finfo(weight_R.dtype).tiny)

    counted_M1 = ((num_positives_M > 0) & (weight_M > 0))[:, None]
    negative_ME = ~hidden.query_doc_ME & ~batch.positive_ME
    observed = Observed.from_matrices(
        sim_ME.detach(), batch.positive_ME & counted_M1, negative_ME & counted_M1
    )
    return (weight_R * loss_R).sum(), observed


@dataclass(frozen=True)
class _Batch:
    """Similarities, and the pairs of query i_R with its positive document t_R.

    `positive_ME` marks the positives of a query, `own_ME` the hard negatives that it was given.
    """

    sim_ME: Tensor
    sim_MM: Tensor
    sim_NN: Tensor
    i_R: Tensor
    t_R: Tensor
    positive_ME: Tensor
    own_ME: Tensor

    @classmethod
    def of(
        cls, query_MD: Tensor, doc_ND: Tensor, candidates: Candidates, options: LossOptions
    ) -> _Batch:
        bank_CD = doc_ND[:0] if options.bank is None else options.bank.doc_CD.detach()
        if options.normalize:
            query_MD, doc_ND, bank_CD = (F.normalize(x, dim=1) for x in (query_MD, doc_ND, bank_CD))
        sim_ME = query_MD @ torch.cat([doc_ND, bank_CD]).T
        there_MP = candidates.target_MP != NO_TARGET
        i_R, t_R = there_MP.nonzero()[:, 0], candidates.target_MP[there_MP]
        positive_ME = torch.zeros_like(sim_ME, dtype=torch.bool)
        positive_ME[i_R, t_R] = True
        own_ME = torch.zeros_like(positive_ME)
        if candidates.owner_N is not None:
            index_M1 = torch.arange(len(query_MD), device=query_MD.device)[:, None]
            own_ME[:, : len(doc_ND)] = candidates.owner_N == index_M1
        sim_MM, sim_NN = query_MD @ query_MD.T, doc_ND @ doc_ND.T
        return cls(sim_ME, sim_MM, sim_NN, i_R, t_R, positive_ME, own_ME)


@dataclass
class _Hidden:
    """True where the column's text is hidden from the row's."""

    query_doc_ME: Tensor
    doc_query_NM: Tensor
    query_query_MM: Tensor
    doc_doc_RN: Tensor


def _hidden_by_vectors(batch: _Batch, candidates: Candidates, bank: Bank | None) -> _Hidden:
    """Hide by owners and keys, whatever the similarities are."""
    num_docs, i_R, t_R = len(batch.sim_NN), batch.i_R, batch.t_R
    own_MN, positive_MN = batch.own_ME[:, :num_docs], batch.positive_ME[:, :num_docs]
    hidden_ME = torch.zeros_like(batch.positive_ME)
    if candidates.owner_N is not None and candidates.own_only:
        hidden_ME[:, :num_docs] = (candidates.owner_N >= 0) & ~own_MN
    hidden_MM = torch.eye(len(hidden_ME), device=hidden_ME.device).bool()
    hidden_NN = torch.zeros_like(batch.sim_NN, dtype=torch.bool)
    hidden_MN = torch.zeros_like(own_MN)
    key_MK, key_N = candidates.query_key_MK, candidates.doc_keys
    if key_MK is not None and key_N is not None:
        hidden_ME[:, :num_docs] |= (key_MK[:, None, :] == key_N[:, None]).any(dim=2)
        hidden_MM |= (key_MK[:, None, :, None] == key_MK[:, None, :]).any(-1).any(-1)
        key_ML = candidates.positive_key_ML
        assert key_ML is not None
        hidden_NN = key_N[:, None] == key_N
        hidden_MN = (key_ML[:, None, :] == key_N[:, None]).any(dim=2)
        if bank is not None and bank.keys_C is not None:
            hidden_ME[:, num_docs:] |= (key_MK[:, None, :] == bank.keys_C[:, None]).any(dim=2)
    hidden_NM = hidden_ME[:, :num_docs].T.clone()
    if candidates.own_keys is not None:
        key_ML = candidates.positive_key_ML
        assert key_ML is not None
        assert key_N is not None
        of_one_R1 = (positive_MN.sum(dim=0) == 1)[t_R, None]
        key_RL = torch.where(of_one_R1, key_ML[i_R], key_N[t_R, None])
        hidden_NM[t_R] |= (candidates.own_keys == key_RL[:, :, None]).any(dim=1)
    hidden_RN = hidden_NN[t_R] | (hidden_MN | own_MN | positive_MN)[i_R]
    return _Hidden(hidden_ME, hidden_NM, hidden_MM, hidden_RN)


def _hide_false_negatives(
    hidden: _Hidden, batch: _Batch, false_negatives: FalseNegatives, bank: Bank | None
) -> None:
    """Hide what is about as similar as the positive besides."""
    num_docs, i_R, t_R = len(batch.sim_NN), batch.i_R, batch.t_R
    guide_ME, guide_MM, guide_NN = (
        sim.detach() for sim in (batch.sim_ME, batch.sim_MM, batch.sim_NN)
    )
    if false_negatives.guided:
        assert false_negatives.query_guide_MG is not None
        assert false_negatives.doc_guide_NG is not None
        bank_guide = [bank.guide_CG] if bank is not None and bank.guide_CG is not None else []
        seen_EG = torch.cat([false_negatives.doc_guide_NG, *bank_guide])
        query_MG = F.normalize(false_negatives.query_guide_MG.to(guide_ME.dtype), dim=1)
        seen_EG = F.normalize(seen_EG.to(guide_ME.dtype), dim=1)
        guide_ME, guide_MM = query_MG @ seen_EG.T, query_MG @ query_MG.T
        guide_NN = seen_EG[:num_docs] @ seen_EG[:num_docs].T
    best_M = guide_ME.masked_fill(~batch.positive_ME, -torch.inf).amax(dim=1)
    scale_M = best_M.abs() if false_negatives.relative else 1.0
    bound_M = best_M - scale_M * false_negatives.margin
    bound_N = bound_M.new_full((num_docs,), -torch.inf)
    bound_N = bound_N.scatter_reduce(0, t_R, bound_M[i_R], "amax")
    hidden.query_doc_ME |= guide_ME > bound_M[:, None]
    hidden.doc_query_NM |= (guide_ME[:, :num_docs] > bound_N).T
    hidden.query_query_MM |= guide_MM > bound_M[:, None]
    hidden.doc_doc_RN |= guide_NN[t_R] > bound_M[i_R, None]


def _logits(
    batch: _Batch, hidden: _Hidden, temperature: float | Tensor, hardness: Hardness | None
) -> dict[Direction, Tensor]:
    """Logits (R, candidates) of each pair by direction, -inf where hidden."""
    num_docs, i_R, t_R = len(batch.sim_NN), batch.i_R, batch.t_R
    logit_ME = batch.sim_ME / temperature
    if hardness is not None:
        weighted_ME = {
            Negatives.HARD: batch.own_ME,
            Negatives.IN_BATCH: ~batch.own_ME,
            Negatives.ALL: torch.ones_like(batch.own_ME),
        }[hardness.on]
        extra_ME = hardness.strength * batch.sim_ME.detach()
        logit_ME = logit_ME + extra_ME.masked_fill(batch.positive_ME | ~weighted_ME, 0.0)
    logit_NM = batch.sim_ME.T[:num_docs] / temperature
    logit_MM, logit_RN = batch.sim_MM / temperature, batch.sim_NN[t_R] / temperature
    return {
        Direction.QUERY_TO_DOC: logit_ME.masked_fill(hidden.query_doc_ME, -torch.inf)[i_R],
        Direction.DOC_TO_QUERY: logit_NM.masked_fill(hidden.doc_query_NM, -torch.inf)[t_R],
        Direction.QUERY_TO_QUERY: logit_MM.masked_fill(hidden.query_query_MM, -torch.inf)[i_R],
        Direction.DOC_TO_DOC: logit_RN.masked_fill(hidden.doc_doc_RN, -torch.inf),
    }
