"""The chunked gradient for a user's own loop, model and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lowmem_cft.data.chunks import cut_by_length
from lowmem_cft.gradient.embedding_cache import Slots
from lowmem_cft.gradient.gradcache import Encode, gradcache_step
from lowmem_cft.gradient.plan import StepPlan


@dataclass(frozen=True)
class ChunkedGradient:
    """The loss of a batch, a scalar without a graph, and the plan that the step ended with.

    The plan is the one that it began with unless memory ran out; the next step may begin with its
    `backward_tokens`.
    """

    loss: Tensor
    plan: StepPlan


def chunked_gradient(
    encode: Encode,
    loss: Callable[[Tensor], Tensor],
    *,
    lengths: Sequence[int],
    parameters: Sequence[nn.Parameter],
    chunk_tokens: int = 4096,
    keep_graphs: bool = False,
    gradient_scale: float = 1.0,
) -> ChunkedGradient:
    """Add the gradient of a loss over all embeddings of a batch to `.grad`, chunk by chunk.

    The gradient is that of `loss(encode(everything)).backward()`, whatever the chunks, and memory is
    that of one chunk and of the embeddings (GradCache, arXiv 2101.06983). Random numbers of torch,
    such as dropout's, are drawn again as they were. Where memory runs out, the step goes on with
    smaller chunks.

    Args:
        encode: maps int64 (B,) places in the batch, on the CPU, to embeddings (B, D). It is called
            twice for each text whose graph is not kept, and must give the same both times.
        loss: maps embeddings (N, D), float32 or wider, to a scalar. Parameters of its own may stand
            in `parameters`.
        lengths: the N items' lengths, in tokens or any other unit of their cost.
        parameters: what gets a gradient.
        chunk_tokens: items times the longest's length, for each chunk at most.
        keep_graphs: keep the first pass's graphs as far as memory allows, which saves the second.
        gradient_scale: factor on the gradient, for `torch.amp.GradScaler`.

    Raises:
        ValueError: there are no items, or no parameter asks for a gradient.
        RuntimeError: memory ran out with one item in work; or memory ran out while `encode` draws
            random numbers, which can be drawn again for the same chunks only.

    >>> import torch
    >>> from lowmem_cft.gradient import chunked_gradient
    >>> model, inputs = torch.nn.Linear(4, 2), torch.randn(6, 4)
    >>> def pairs_apart(emb_ND):  # rows 0 and 3, 1 and 4, 2 and 5 belong together
    ...     return (emb_ND[:3] - emb_ND[3:]).square().sum()
    >>> step = chunked_gradient(
    ...     lambda place_B: model(inputs[place_B]),
    ...     pairs_apart,
    ...     lengths=[1] * 6,
    ...     parameters=list(model.parameters()),
    ...     chunk_tokens=2,
    ... )
    >>> (plain,) = torch.autograd.grad(pairs_apart(model(inputs)), [model.weight])
    >>> torch.allclose(model.weight.grad, plain, atol=1e-5)
    True
    """
    if len(lengths) == 0:
        raise ValueError("lengths: got none, wanted one for each item of the batch")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("parameters: none of them asks for a gradient (requires_grad)")
    replayed = _Replayed(encode, {parameter.device for parameter in trained})
    own: list[Tensor | None] = []

    def differentiate(emb_ND: Tensor, d_emb_ND: Tensor, workspace_bytes: int) -> Tensor:
        replayed.again = True
        leaf_ND = emb_ND.detach().to(d_emb_ND.dtype).requires_grad_()
        with torch.enable_grad():
            value = loss(leaf_ND)
        d_leaf_ND, *own[:] = torch.autograd.grad(value, [leaf_ND, *trained], allow_unused=True)
        d_emb_ND.zero_() if d_leaf_ND is None else d_emb_ND.copy_(d_leaf_ND)
        return value.detach()

    value, plan = gradcache_step(
        replayed,
        differentiate,
        cut=partial(cut_by_length, np.asarray(lengths, dtype=np.int64)),
        slots=Slots(torch.arange(len(lengths))),
        parameters=trained,
        plan=StepPlan(
            backward_tokens=chunk_tokens,
            forward_tokens=chunk_tokens,
            kept_tokens=None if keep_graphs else 0,
        ),
        gradient_scale=gradient_scale,
    )
    for parameter, gradient in zip(trained, own, strict=True):
        if gradient is not None:
            scaled = gradient * gradient_scale
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled
    return ChunkedGradient(value, plan)


class _Replayed:
    """Encodes; a chunk that is encoded again draws the random numbers that it drew before."""

    def __init__(self, encode: Encode, devices: set[torch.device]) -> None:
        self._encode = encode
        self._gpus = sorted(device.index or 0 for device in devices if device.type == "cuda")
        self._states: dict[bytes, list[Tensor]] = {}
        self._draws = False
        self.again = False

    def __call__(self, place_B: Tensor) -> Tensor:
        key = place_B.numpy().tobytes()
        if self.again and key in self._states:
            with self._drawn_from(self._states[key]):
                return self._encode(place_B)
        if self.again and self._draws:
            raise RuntimeError(
                "memory ran out, and encode draws random numbers, which cannot be drawn again in "
                "smaller chunks; lower chunk_tokens, or put the model in evaluation mode"
            )
        self._states[key] = self._state()
        emb_BD = self._encode(place_B)
        states = zip(self._states[key], self._state(), strict=True)
        self._draws |= not all(torch.equal(earlier, later) for earlier, later in states)
        return emb_BD

    def _state(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in self._gpus)]

    @contextmanager
    def _drawn_from(self, states: list[Tensor]) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._gpus):
            torch.set_rng_state(states[0])
            for gpu, state in zip(self._gpus, states[1:], strict=True):
                torch.cuda.set_rng_state(state, gpu)
            yield
