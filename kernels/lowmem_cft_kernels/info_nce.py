"""The public call: validate, choose a path, give loss and gradients together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lowmem_cft_kernels import chunked, reference
from lowmem_cft_kernels.masks import Candidates

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Path(str, Enum):
    """How the loss is computed. Every path gives the same numbers up to rounding."""

    REFERENCE = "reference"
    """The formula through autograd; holds the M x N matrix several times."""
    CHUNKED = "chunked"
    """Plain torch on any device, in a bounded workspace."""


@dataclass(frozen=True, kw_only=True)
class InfoNCEResult:
    """Value and gradients; float32 (float64 for float64 inputs).

    `d_temperature` is () and the derivative with respect to the temperature itself.
    `accuracy` is the share of queries whose positive scores at least as high as all they see.
    """

    loss: Tensor
    d_query_MD: Tensor
    d_doc_ND: Tensor
    d_temperature: Tensor
    accuracy: Tensor
    path: Path


def _validate(query_MD: Tensor, doc_ND: Tensor, candidates: Candidates, temperature: float) -> None:
    if query_MD.ndim != 2 or doc_ND.ndim != 2 or query_MD.shape[1] != doc_ND.shape[1]:
        raise ValueError(
            f"got queries {tuple(query_MD.shape)} and documents {tuple(doc_ND.shape)}, "
            "wanted (M, D) and (N, D) with one D"
        )
    if query_MD.dtype != doc_ND.dtype or query_MD.dtype not in DTYPES:
        raise ValueError(
            f"got {query_MD.dtype} queries and {doc_ND.dtype} documents, wanted one floating dtype"
        )
    if not query_MD.shape[0] or not doc_ND.shape[0]:
        raise ValueError("got no queries or no documents, wanted at least one of each")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}, wanted a finite number above 0")
    candidates.validate(query_MD.shape[0], doc_ND.shape[0])


def _validate_out(query_MD: Tensor, doc_ND: Tensor, out: tuple[Tensor, Tensor] | None) -> None:
    wanted = torch.promote_types(query_MD.dtype, torch.float32)
    for given, like in zip(out or (), (query_MD, doc_ND), strict=False):
        if given.shape != like.shape or given.dtype != wanted or given.device != like.device:
            raise ValueError(
                f"out: got {given.dtype} {tuple(given.shape)} on {given.device}, "
                f"wanted {wanted} {tuple(like.shape)} on {like.device}"
            )


def info_nce(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    *,
    temperature: float,
    symmetric: bool = False,
    path: Path = Path.CHUNKED,
    workspace_bytes: int = chunked.WORKSPACE_BYTES,
    out: tuple[Tensor, Tensor] | None = None,
) -> InfoNCEResult:
    """InfoNCE loss and its gradients in one call; nothing is kept for a backward pass.

    Args:
        query_MD: (M, D), float16, bfloat16, float32 or float64; used as given.
        doc_ND: (N, D), same dtype and device: positives and hard negatives together.
        candidates: each query's positive column and which documents it sees.
        temperature: > 0; similarities are divided by it.
        symmetric: mean of query -> document and document -> query.
        path: how to compute it.
        workspace_bytes: bound on what the chunked path holds besides inputs and gradients, as
            far as one query's row of logits allows.
        out: (M, D) and (N, D) to write the gradients to, in the dtype they would have, so that
            views of one buffer can be filled without a copy.

    Raises:
        ValueError: shapes, dtypes, indices or the temperature do not fit.
    """
    _validate(query_MD, doc_ND, candidates, temperature)
    _validate_out(query_MD, doc_ND, out)
    if path is Path.REFERENCE:
        return _by_autograd(query_MD, doc_ND, candidates, temperature, symmetric, out)
    loss, d_query_MD, d_doc_ND, d_temperature, num_first = chunked.info_nce_value_and_grad(
        query_MD.detach(),
        doc_ND.detach(),
        candidates,
        temperature=temperature,
        symmetric=symmetric,
        workspace_bytes=workspace_bytes,
        out=out,
    )
    return InfoNCEResult(
        loss=loss,
        d_query_MD=d_query_MD,
        d_doc_ND=d_doc_ND,
        d_temperature=d_temperature,
        accuracy=num_first / query_MD.shape[0],
        path=path,
    )


def _by_autograd(
    query_MD: Tensor,
    doc_ND: Tensor,
    candidates: Candidates,
    temperature: float,
    symmetric: bool,
    out: tuple[Tensor, Tensor] | None,
) -> InfoNCEResult:
    compute = torch.float64 if query_MD.dtype == torch.float64 else torch.float32
    query_MD = query_MD.detach().to(compute).requires_grad_()
    doc_ND = doc_ND.detach().to(compute).requires_grad_()
    scale = torch.tensor(temperature, dtype=compute, device=query_MD.device, requires_grad=True)
    with torch.enable_grad():
        loss = reference.info_nce_loss(
            query_MD, doc_ND, candidates, temperature=scale, symmetric=symmetric
        )
        d_query_MD, d_doc_ND, d_temperature = torch.autograd.grad(loss, (query_MD, doc_ND, scale))
    if out is not None:
        d_query_MD, d_doc_ND = out[0].copy_(d_query_MD), out[1].copy_(d_doc_ND)
    with torch.no_grad():
        sim_MN = query_MD @ doc_ND.T
        hidden_MN = candidates.hidden(slice(0, query_MD.shape[0]))
        if hidden_MN is not None:
            sim_MN.masked_fill_(hidden_MN, -torch.inf)
        positive_M1 = sim_MN.gather(1, candidates.target_M[:, None])
        accuracy = (sim_MN.amax(dim=1, keepdim=True) <= positive_M1).float().mean()
    return InfoNCEResult(
        loss=loss.detach(),
        d_query_MD=d_query_MD,
        d_doc_ND=d_doc_ND,
        d_temperature=d_temperature,
        accuracy=accuracy,
        path=Path.REFERENCE,
    )
