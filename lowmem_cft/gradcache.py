"""The exact gradient of a loss over a whole batch, computed chunk by chunk.

Phase 1 embeds every text without a graph. The loss over the whole batch gives d loss / d embedding
for all of them in one call. Phase 2 embeds chunk by chunk again, with a graph, and back-propagates
each chunk's share. By the chain rule the sum over chunks is the gradient of the plain full-batch
step (GradCache, arXiv 2101.06983), provided that phase 2 repeats phase 1's embeddings: dropout
here depends on a text's identity, not on when it is computed.

`encode` and `loss` are arguments: this module knows neither the model nor which loss it serves.

Shape suffixes: P texts of the step (the pool), D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Encode = Callable[[Tensor], Tensor]
"""Maps int64 (b,) places in the pool to their embeddings (b, D), differentiable in the adapter."""

Report = TypeVar("Report")
Loss = Callable[[Tensor], tuple[Tensor, Report]]
"""Maps embeddings (P, D) to d loss / d embedding (P, D) and whatever is to be reported."""


def embed(encode: Encode, chunks: Sequence[Tensor], num_texts: int) -> Tensor:
    """emb_PD (P, D) of all chunks, in pool order, without a graph."""
    emb_PD: Tensor | None = None
    with torch.no_grad():
        for place_B in chunks:
            emb_BD = encode(place_B)
            if emb_PD is None:
                emb_PD = emb_BD.new_empty((num_texts, emb_BD.shape[1]))
            emb_PD[place_B.to(emb_BD.device)] = emb_BD
    assert emb_PD is not None, "a step without texts"
    return emb_PD


def backpropagate(
    encode: Encode, chunks: Sequence[Tensor], d_emb_PD: Tensor, gradient_scale: float = 1.0
) -> None:
    """Add the gradient of the step to the parameters' `.grad`, a chunk at a time.

    Args:
        d_emb_PD: d loss / d embedding.
        gradient_scale: factor on the gradient that enters the model (fp16 loss scaling).
    """
    for place_B in chunks:
        emb_BD = encode(place_B)
        d_emb_BD = d_emb_PD[place_B.to(d_emb_PD.device)]
        torch.autograd.backward(emb_BD, d_emb_BD.to(emb_BD.dtype) * gradient_scale)


def gradcache_step(
    encode: Encode,
    loss: Loss[Report],
    *,
    forward_chunks: Sequence[Tensor],
    backward_chunks: Sequence[Tensor],
    num_texts: int,
    gradient_scale: float = 1.0,
) -> Report:
    """Loss and exact gradient of one logical batch; gradients are added to `.grad`.

    Args:
        encode, loss: see `Encode` and `Loss`.
        forward_chunks, backward_chunks: int64 places in the pool; each list holds every place
            0..num_texts-1 exactly once. They may differ: without a graph more fits.
        gradient_scale: see `backpropagate`.

    Returns:
        What `loss` reported.
    """
    for chunks in (forward_chunks, backward_chunks):
        assert sum(len(chunk) for chunk in chunks) == num_texts, "chunks do not cover the pool"
    d_emb_PD, report = loss(embed(encode, forward_chunks, num_texts))
    backpropagate(encode, backward_chunks, d_emb_PD, gradient_scale)
    return report
