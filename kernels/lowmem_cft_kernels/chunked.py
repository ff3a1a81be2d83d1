"""InfoNCE value and gradient in bounded memory, on any device, in plain torch.

Blocks of query rows are scored against all documents; a block's logits live only while it is
worked on. Logits are always float32 (float64 for float64 inputs): rounding them to 16 bit costs
percents of the gradient at low temperatures, rounding the probabilities does not. With both
directions the first pass collects the column log-sum-exp and the second recomputes each block, so
one block is all that is ever held.

    d loss / d s_ij = (exp(s_ij - lse_i) - [j = t(i)]) / M                     (rows)
                    + c_j exp(s_ij - lse_j) / M - [j = t(i)] / M               (columns)

with c_j the number of queries whose positive is j. The temperature needs no pass of its own: with
G = d loss / d s, d loss / d temperature = -sum_ij G_ij s_ij / temperature
= -sum_i <q_i, d loss / d q_i> / temperature.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem_cft_kernels.masks import Candidates

WORKSPACE_BYTES = 32 * 2**20
"""Bound on the memory that one block of logits and its temporaries take."""

_TILE_BYTES = 4 * 2**20
"""Documents held in the compute dtype at once, where they come in another."""

_BLOCK_COPIES = 3  # logits, mask or product, probabilities: what lives at once per logit


def rows_per_block(num_docs: int, itemsize: int, workspace_bytes: int = WORKSPACE_BYTES) -> int:
    """Query rows whose logits against `num_docs` documents fit the workspace (at least one)."""
    return max(1, workspace_bytes // (num_docs * itemsize * _BLOCK_COPIES))


def _blocks(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _doc_tiles(doc_ND: Tensor, compute: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The documents in the compute dtype: as they are, or tile by tile if that takes a copy."""
    num_docs = doc_ND.shape[0]
    size = num_docs
    if doc_ND.dtype != compute:
        size = max(1, _TILE_BYTES // (doc_ND.shape[1] * compute.itemsize))
    for columns in _blocks(num_docs, size):
        yield columns, doc_ND[columns].to(compute)


def _logits(
    query_BD: Tensor, doc_ND: Tensor, candidates: Candidates, rows: slice, temperature: float
) -> Tensor:
    sim_BN = query_BD.new_empty((query_BD.shape[0], doc_ND.shape[0]))
    for columns, tile_CD in _doc_tiles(doc_ND, query_BD.dtype):
        torch.matmul(query_BD, tile_CD.T, out=sim_BN[:, columns])
    sim_BN.mul_(1.0 / temperature)
    hidden_BN = candidates.hidden(rows)
    if hidden_BN is not None:
        sim_BN.masked_fill_(hidden_BN, -torch.inf)
    return sim_BN


def _column_lse(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    temperature: float,
    block: int,
    compute: torch.dtype,
) -> Tensor:
    lse_N = query_MD.new_full((doc_ND.shape[0],), -torch.inf, dtype=compute)
    for rows in _blocks(query_MD.shape[0], block):
        sim_BN = _logits(query_MD[rows].to(compute), doc_ND, candidates, rows, temperature)
        torch.logaddexp(lse_N, sim_BN.logsumexp(dim=0), out=lse_N)
    return lse_N


def info_nce_value_and_grad(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    *,
    temperature: float,
    symmetric: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, d_query_MD, d_doc_ND, d_temperature, and how many queries rank their positive first.

    Args:
        query_MD, doc_ND: (M, D), (N, D), float16, bfloat16, float32 or float64.
        candidates, temperature, symmetric: as in `reference.info_nce_loss`.
        workspace_bytes: bound on the logits held at once; does not change the result beyond
            rounding.
        out: d_query_MD and d_doc_ND to write to, contiguous rows, in the dtype they would have.

    Returns:
        Scalars and gradients in float32 (float64 for float64 inputs); the count is int64.
    """
    compute = torch.float64 if query_MD.dtype == torch.float64 else torch.float32
    num_queries, target_M = query_MD.shape[0], candidates.target_M
    block = rows_per_block(doc_ND.shape[0], compute.itemsize, workspace_bytes)
    weight = (0.5 if symmetric else 1.0) / num_queries

    lse_N = targets_N = None
    if symmetric:
        lse_N = _column_lse(query_MD, doc_ND, candidates, temperature, block, compute)
        targets_N = torch.bincount(target_M, minlength=doc_ND.shape[0]).to(compute)

    loss = query_MD.new_zeros((), dtype=compute)
    d_temperature = torch.zeros_like(loss)
    num_first = torch.zeros((), dtype=torch.int64, device=query_MD.device)
    if out is None:
        out = (
            query_MD.new_empty(query_MD.shape, dtype=compute),
            torch.empty_like(doc_ND, dtype=compute),
        )
    d_query_MD, d_doc_ND = out
    d_doc_ND.zero_()
    for rows in _blocks(num_queries, block):
        query_BD, d_query_BD = query_MD[rows].to(compute), d_query_MD[rows]
        sim_BN = _logits(query_BD, doc_ND, candidates, rows, temperature)
        target_B1 = target_M[rows, None]
        positive_B1 = sim_BN.gather(1, target_B1)
        lse_B1 = sim_BN.logsumexp(dim=1, keepdim=True)
        loss += (lse_B1 - positive_B1).sum() * weight
        num_first += (sim_BN.amax(dim=1, keepdim=True) <= positive_B1).sum()
        if lse_N is None or targets_N is None:
            grad_BN = sim_BN.sub_(lse_B1).exp_()
            num_directions = 1.0
        else:
            loss += (lse_N[target_M[rows], None] - positive_B1).sum() * weight
            columns_BN = (sim_BN - lse_N.nan_to_num(neginf=0.0)).exp_().mul_(targets_N)
            grad_BN = sim_BN.sub_(lse_B1).exp_().add_(columns_BN)
            del columns_BN
            num_directions = 2.0
        grad_BN.scatter_add_(1, target_B1, torch.full_like(positive_B1, -num_directions))
        grad_BN.mul_(weight / temperature)
        d_query_BD.zero_()
        for columns, tile_CD in _doc_tiles(doc_ND, compute):
            d_query_BD.addmm_(grad_BN[:, columns], tile_CD)
            d_doc_ND[columns].addmm_(grad_BN[:, columns].T, query_BD)
        d_temperature -= torch.tensordot(query_BD, d_query_BD) / temperature
        del sim_BN, grad_BN  # or they would live beside the next block's
    return loss, d_query_MD, d_doc_ND, d_temperature, num_first
