"""The exact gradient of a loss over a whole batch, computed chunk by chunk.

Phase 1 embeds every text. The loss over the whole batch gives d loss / d embedding for all of them
in one call. Phase 2 back-propagates each chunk's share. Chunks that kept their graph in phase 1
only go backward; the others are embedded again, with a graph. By the chain rule the sum over
chunks is the gradient of the plain full-batch step (GradCache, arXiv 2101.06983), provided that
phase 2 repeats phase 1's embeddings: dropout here depends on a text's identity, not on when it is
computed.

Where memory runs out, the chunk in work is given up whole, the budget of its phase is halved, and
the same step goes on with smaller chunks. A chunk adds all of its gradient or none, so the result
stays exact.

`encode` and `loss` are arguments: this module knows neither the model nor which loss it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lowmem_cft.data.chunks import Chunk, Cut
from lowmem_cft.gradient.embedding_cache import EmbeddingCache, Slots
from lowmem_cft.gradient.oom import DoesNotFit, try_in_memory, work_off
from lowmem_cft.gradient.plan import MIN_WORKSPACE_BYTES, StepPlan

Report = TypeVar("Report")

Encode = Callable[[Tensor], Tensor]
"""Maps int64 (B,) places in the pool to their embeddings (B, D), differentiable in the adapter."""

Loss = Callable[[Tensor, Tensor, int], Report]
"""(emb_SD, d_emb_SD, workspace bytes): writes d loss / d embedding into the second, and reports.

It may be called again after it ran out of memory."""


class _Step(Generic[Report]):
    """One logical batch on its way through both phases; see `gradcache_step`."""

    def __init__(
        self,
        encode: Encode,
        loss: Loss[Report],
        cut: Cut,
        slots: Slots,
        parameters: Sequence[nn.Parameter],
        plan: StepPlan,
        gradient_scale: float,
    ) -> None:
        self.encode, self.loss, self.cut = encode, loss, cut
        self.parameters, self.scale = parameters, gradient_scale
        self.plan = plan
        self.cache = EmbeddingCache(slots, plan.embedding_dtype, offload=plan.offload_embeddings)
        self.graphs: list[tuple[Chunk, Tensor]] = []
        self.dropped: list[Chunk] = []  # without a graph: phase 2 encodes them again

    # -- phase 1 --------------------------------------------------------------------------------

    def choose_kept(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks whose graphs the plan keeps; the others will be encoded again."""
        chosen, tokens = [], 0
        for chunk in chunks:
            if self.plan.keeps(tokens + chunk.tokens):
                chosen.append(chunk)
                tokens += chunk.tokens
            else:
                self.dropped.append(chunk)
        return chosen

    def embed(self, chunks: Sequence[Chunk]) -> None:
        """Embed without a graph, in the larger chunks that this allows."""
        budget = work_off(
            _places(chunks), self.plan.forward_tokens, self.cut, self._embed, "embedding"
        )
        self.plan = replace(self.plan, forward_tokens=budget)

    def _embed(self, chunk: Chunk) -> None:
        with torch.no_grad():
            self.cache.write(chunk.place_B, self.encode(chunk.place_B))

    def embed_keeping(self, chunks: Sequence[Chunk]) -> None:
        """Embed and keep the graphs, as far as they fit."""
        for i, chunk in enumerate(chunks):
            if not try_in_memory(partial(self._keep, chunk)):
                self._halve_kept()
                self.embed(chunks[i:])
                self.dropped += chunks[i:]
                return

    def _keep(self, chunk: Chunk) -> None:
        emb_BD = self.encode(chunk.place_B)
        self.cache.write(chunk.place_B, emb_BD)
        self.graphs.append((chunk, emb_BD))

    def _halve_kept(self) -> None:
        """Let go of half the kept graphs, and keep no more from now on."""
        budget = sum(chunk.tokens for chunk, _ in self.graphs) // 2
        self.plan = replace(self.plan, kept_tokens=budget)
        remaining, tokens = [], 0
        for chunk, emb_BD in self.graphs:
            if tokens + chunk.tokens <= budget:
                remaining.append((chunk, emb_BD))
                tokens += chunk.tokens
            else:
                self.dropped.append(chunk)
        self.graphs = remaining

    # -- the loss -------------------------------------------------------------------------------

    def differentiate(self) -> Report:
        """Compute the loss and its gradient at the embeddings, in less workspace if need be."""
        reports: list[Report] = []

        def work() -> None:
            emb_SD, d_emb_SD = self.cache.for_loss()
            report = self.loss(emb_SD, d_emb_SD, self.plan.workspace_bytes)
            self.cache.keep_gradient(d_emb_SD)
            reports.append(report)

        while not try_in_memory(work):
            if self.graphs:
                self._halve_kept()
            elif self.plan.workspace_bytes // 2 >= MIN_WORKSPACE_BYTES:
                halved = self.plan.workspace_bytes // 2
                self.plan = replace(self.plan, workspace_bytes=halved)
            else:
                raise DoesNotFit(
                    "memory ran out in the loss: the embeddings of the batch and their gradient "
                    "do not fit; lower train.logical_batch or set memory.offload_embeddings: on"
                )
        return reports[0]

    # -- phase 2 --------------------------------------------------------------------------------

    def backpropagate(self) -> None:
        """Add every text's share to the gradients: kept graphs first, which frees their memory."""
        while self.graphs:
            if not try_in_memory(self._backpropagate_kept):
                self._halve_kept()
        budget = work_off(
            _places(self.dropped),
            self.plan.backward_tokens,
            self.cut,
            self._encode_and_backpropagate,
            "back-propagating",
        )
        self.plan = replace(self.plan, backward_tokens=budget)

    def _backpropagate_kept(self) -> None:
        chunk, emb_BD = self.graphs.pop()
        self.dropped.append(chunk)  # where this fails half-way, the graph is spent
        self._add_gradient(chunk, emb_BD)
        self.dropped.pop()

    def _encode_and_backpropagate(self, chunk: Chunk) -> None:
        self._add_gradient(chunk, self.encode(chunk.place_B))

    def _add_gradient(self, chunk: Chunk, emb_BD: Tensor) -> None:
        d_emb_BD = self.cache.gradient(chunk.place_B).to(emb_BD.dtype).mul_(self.scale)
        gradients = torch.autograd.grad(emb_BD, self.parameters, d_emb_BD, allow_unused=True)
        pairs = [(p, g) for p, g in zip(self.parameters, gradients, strict=True) if g is not None]
        new = [(p, g.contiguous()) for p, g in pairs if p.grad is None]
        sums = [(p.grad, g) for p, g in pairs if p.grad is not None]
        # From here on nothing is allocated: the chunk's share goes in whole or not at all.
        if sums:
            torch._foreach_add_([total for total, _ in sums], [g for _, g in sums])
        for parameter, gradient in new:
            parameter.grad = gradient


def _places(chunks: Sequence[Chunk]) -> Tensor:
    """int64, the places of all texts in the chunks."""
    none = torch.empty(0, dtype=torch.int64)
    return torch.cat([none, *(chunk.place_B for chunk in chunks)])


def gradcache_step(
    encode: Encode,
    loss: Loss[Report],
    *,
    cut: Cut,
    slots: Slots,
    parameters: Sequence[nn.Parameter],
    plan: StepPlan,
    gradient_scale: float = 1.0,
) -> tuple[Report, StepPlan]:
    """Loss and exact gradient of one logical batch; gradients are added to `.grad`.

    Args:
        encode, loss, cut: see `Encode`, `Loss` and `data.chunks.Cut`.
        slots: which rows of the loss each text of the pool stands in.
        parameters: the ones that are trained.
        plan: how to compute it. `checkpoint_every` is the model's business, not used here.
        gradient_scale: factor on the gradient that enters the model (fp16 loss scaling).

    Returns:
        What `loss` reported, and the plan as it is now: smaller where memory ran out.

    Raises:
        DoesNotFit: memory ran out with one text in work, or in the loss. Gradients are then
            incomplete.
    """
    step = _Step(encode, loss, cut, slots, parameters, plan, gradient_scale)
    with_graph = step.choose_kept(cut(torch.arange(slots.num_texts), plan.backward_tokens))
    step.embed(step.dropped)
    step.embed_keeping(with_graph)
    report = step.differentiate()
    step.backpropagate()
    return report, step.plan
