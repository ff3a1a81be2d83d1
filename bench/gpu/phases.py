"""Looks into a training step from outside: the seconds of its phases, or a sample of its chunks.

`watched` puts itself between a step and its encoder, its loss and the cut into chunks; what the step
computes is left as it is, but where a sample of it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.device import synchronize
from bench.harness import replaced
from lowmem_cft.data.chunks import Chunk, cut_by_length
from lowmem_cft.gradient import step as steps
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.model.encoder import Encoder
from lowmem_cft_kernels import info_nce

_FILLED_AT_ONCE = 8192

SCALED = ("embedding", "backward")
"""Phases that take as much longer as there are more chunks in them."""


class PhaseClock:
    """Seconds of each phase; the device is waited for where one ends, and nowhere else."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._phase, self._since = "", 0.0

    def enter(self, phase: str) -> None:
        """The phase before it ends here; an empty name ends them all."""
        if phase == self._phase:
            return
        synchronize(self.device)
        now = time.perf_counter()
        if self._phase:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now


class Sample:
    """Which of a step's texts go through the model: those of every k-th chunk, the longest first.

    All chunks that the plan keeps the graphs of are among them, so that no moment of the step holds
    less than it would. The other texts' embeddings are random. With `every` 1 nothing is left out.
    """

    def __init__(self, every: int, plan: StepPlan) -> None:
        self.every, self.plan = every, plan
        self.padded_tokens = 0
        self.scale = 1.0
        """Padded tokens of all chunks whose graphs are not kept, by those of the chosen ones."""
        self.share = 1.0
        self._chosen_P: Tensor | None = None

    def choose(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks of the sample, from those of the whole step."""
        kept, others, tokens = [], [], 0
        for chunk in chunks:
            if self.plan.keeps(tokens + chunk.tokens):
                kept.append(chunk)
                tokens += chunk.tokens
            else:
                others.append(chunk)
        chosen = others[:: self.every]
        self.padded_tokens = sum(chunk.tokens for chunk in chunks)
        if others:
            self.scale = sum(c.tokens for c in others) / sum(c.tokens for c in chosen)
        self.share = sum(c.tokens for c in [*kept, *chosen]) / self.padded_tokens
        in_sample = {id(chunk) for chunk in [*kept, *chosen]}
        self._chosen_P = torch.zeros(sum(len(c.place_B) for c in chunks), dtype=torch.bool)
        for chunk in [*kept, *chosen]:
            self._chosen_P[chunk.place_B] = True
        return [chunk for chunk in chunks if id(chunk) in in_sample]

    def cut(
        self, lengths_P: npt.NDArray[Any], place_B: Tensor, budget: int, chunk_cost: int = 32
    ) -> list[Chunk]:
        """`cut_by_length`; a step's first call of it is the one that cuts all texts."""
        chunks = cut_by_length(lengths_P, place_B, budget, chunk_cost)
        return self.choose(chunks) if self._chosen_P is None else chunks

    def fill(self, emb_RD: Tensor, place_R: Tensor) -> None:
        """Random unit vectors in the rows of texts that are left out."""
        assert self._chosen_P is not None
        (left_out,) = torch.nonzero(~self._chosen_P[place_R], as_tuple=True)
        for row_K in torch.split(left_out.to(emb_RD.device), _FILLED_AT_ONCE):
            random_KD = torch.randn(len(row_K), emb_RD.shape[1], device=emb_RD.device)
            emb_RD[row_K] = F.normalize(random_KD, dim=1).to(emb_RD.dtype)

    def whole(self, seconds_by_phase: dict[str, float]) -> float:
        """Seconds that the whole step would have taken."""
        return sum(
            seconds * (self.scale if phase in SCALED else 1.0)
            for phase, seconds in seconds_by_phase.items()
        )


class _WatchedEncoder:
    """Tells the clock what it is called for: without a graph, with one that is kept, or again."""

    def __init__(self, encoder: Encoder, clock: PhaseClock) -> None:
        self._encoder, self._clock = encoder, clock
        self.loss_is_known = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.loss_is_known:
            self._clock.enter("backward")
        else:
            self._clock.enter("kept_embedding" if torch.is_grad_enabled() else "embedding")
        return self._encoder(*args, **kwargs)


@contextmanager
def watched(
    encoder: Encoder, clock: PhaseClock, sample: Sample, place_S: Tensor
) -> Iterator[Encoder]:
    """Gives the encoder to make a `ContrastiveStep` with, for one call while this is entered.

    Args:
        place_S: int64 (S,), the text of each of the loss's slots.
    """
    between: Any = _WatchedEncoder(encoder, clock)
    after_loss = "backward" if sample.plan.kept_tokens == 0 else "kept_backward"

    def watched_loss(query_MD: Tensor, doc_ND: Tensor, *args: Any, **kwargs: Any) -> Any:
        for emb_RD, place_R in zip(
            (query_MD, doc_ND), place_S.tensor_split([len(query_MD)]), strict=True
        ):
            sample.fill(emb_RD, place_R)
        clock.enter("loss")
        result = info_nce(query_MD, doc_ND, *args, **kwargs)
        clock.enter(after_loss)
        between.loss_is_known = True
        return result

    with (
        replaced(steps, "info_nce", watched_loss),
        replaced(steps, "cut_by_length", sample.cut),
    ):
        clock.enter("embedding")
        yield between
        clock.enter("")
