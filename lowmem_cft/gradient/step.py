"""One training step on a logical batch: its texts through the encoder, the loss and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor, nn

from lowmem_cft.data.batches import NO_OWNER, StepTexts
from lowmem_cft.data.chunks import cut_by_length, pad
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient.embedding_cache import Slots
from lowmem_cft.gradient.gradcache import gradcache_step
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import LossSection
from lowmem_cft_kernels import (
    SOFTMAXES,
    Candidates,
    FalseNegatives,
    Hardness,
    LearnedTemperature,
    LossPath,
    Negatives,
    Observed,
    Products,
    Softmax,
    info_nce,
)
from lowmem_cft_kernels.masks import SHARED


@dataclass(frozen=True)
class LossReport:
    """`loss`, `observed` and `path` as in `InfoNCEResult`; no gradients, which the cache holds.

    `temperature` is the one of this step and `d_raw` d loss / d `LearnedTemperature.raw`, both
    scalars, and None where the temperature is not trained; the step adds `d_raw` to `.grad`, which
    uses it up.
    """

    loss: Tensor
    observed: Observed
    path: LossPath
    temperature: Tensor | None
    d_raw: Tensor | None


@dataclass(frozen=True)
class StepReport:
    """The loss of a step, and how the step went.

    `plan` is the one for the next step: smaller than the one given where memory ran out.
    `tokens` are real ones, `padded_tokens` what they became in the chunks that made the gradient.
    """

    loss_report: LossReport
    plan: StepPlan
    texts: int
    tokens: int
    padded_tokens: int

    @property
    def loss(self) -> Tensor:
        """A scalar."""
        return self.loss_report.loss

    @property
    def padding_share(self) -> float:
        """Padding tokens over real ones."""
        return self.padded_tokens / self.tokens - 1


@dataclass(frozen=True)
class ContrastiveStep:
    """Computes loss and gradient of steps.

    Args:
        encoder: in its training mode when called.
        store: token ids of all texts.
        pad_id: the tokenizer's padding token.
        loss: the recipe's.
        parameters: the adapter's.
        chunk_cost: see `data.chunks.chunk_by_tokens`.
        temperature: in place of the recipe's, and trained.
    """

    encoder: Encoder
    store: TokenStore
    pad_id: int
    loss: LossSection
    parameters: Sequence[nn.Parameter]
    chunk_cost: int
    temperature: LearnedTemperature | None = None

    def __call__(
        self, texts: StepTexts, plan: StepPlan, *, gradient_scale: float = 1.0
    ) -> StepReport:
        """Add the gradient of the step to `.grad`; see `gradcache_step` for what it raises."""
        lengths_P = self.store.lengths[texts.text_P]
        padded = 0

        def encode(place_B: Tensor) -> Tensor:
            nonlocal padded
            batch = pad(self.store, texts.text_P[place_B.numpy()], self.pad_id)
            padded += batch.ids_BT.numel() if torch.is_grad_enabled() else 0
            return self.encoder(batch, place_B)

        report, plan = gradcache_step(
            encode,
            partial(
                _info_nce, candidates_of(texts), self.loss, self.temperature, plan.embedding_dtype
            ),
            cut=partial(cut_by_length, lengths_P, chunk_cost=self.chunk_cost),
            slots=Slots(texts.place_S),
            parameters=self.parameters,
            plan=plan,
            gradient_scale=gradient_scale,
        )
        if self.temperature is not None and report.d_raw is not None:
            _add_gradient(self.temperature.raw, report.d_raw, gradient_scale)
        return StepReport(report, plan, len(lengths_P), int(lengths_P.sum()), padded)


def _add_gradient(parameter: nn.Parameter, gradient: Tensor, scale: float) -> None:
    """Allocates nothing, so it cannot fail half-way. The gradient is used up."""
    gradient.mul_(scale)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def candidates_of(texts: StepTexts) -> Candidates:
    """Query i's positive is document i; the hard negatives come behind the positives."""
    return Candidates(
        target=torch.arange(texts.num_queries),
        owner_N=texts.owner_N.masked_fill(texts.owner_N == NO_OWNER, SHARED),
        own_only=texts.own_only,
        query_keys=texts.query_key_MK,
        doc_keys=texts.doc_key_N,
        positive_keys=texts.positive_key_MK,
        own_keys=texts.own_key_M,
    )


def _info_nce(
    candidates: Candidates,
    section: LossSection,
    learned: LearnedTemperature | None,
    embedding_dtype: str,
    emb_SD: Tensor,
    d_emb_SD: Tensor,
    workspace_bytes: int,
) -> LossReport:
    """The loss of the step's slots: a `gradcache.Loss`, which adds to no parameter's gradient."""
    num_queries = len(candidates.target)
    query, doc = slice(0, num_queries), slice(num_queries, None)
    temperature = None if learned is None else learned()
    split = embedding_dtype == "split-bf16" and emb_SD.dtype == torch.float32
    # looked at before they are on a GPU, which would be waited for
    candidates.validate(num_queries, len(emb_SD) - num_queries)
    result = info_nce(
        emb_SD[query],
        emb_SD[doc],
        candidates.to(emb_SD.device),
        temperature=section.temperature if temperature is None else temperature,
        **loss_options(section),
        products=Products.SPLIT_BF16 if split else Products.EXACT,
        workspace_bytes=workspace_bytes,
        out=(d_emb_SD[query], d_emb_SD[doc]),
    )
    d_raw = None
    if learned is not None and temperature is not None:
        d_temperature = result.d_temperature.to(temperature.dtype)
        (d_raw,) = torch.autograd.grad(temperature, learned.raw, d_temperature)
        temperature = temperature.detach()
    return LossReport(result.loss, result.observed, result.path, temperature, d_raw)


class LossKeywords(TypedDict):
    """The arguments of `info_nce` that a recipe decides, its temperature apart."""

    softmaxes: Sequence[Softmax]
    false_negatives: FalseNegatives | None
    hardness: Hardness | None


def loss_options(section: LossSection) -> LossKeywords:
    """The recipe's choices as arguments of `info_nce`."""
    margin, strength = section.false_negative_margin, section.hardness
    false_negatives = hardness = None
    if margin is not None:
        false_negatives = FalseNegatives(margin=margin, relative=section.false_negative_relative)
    if strength:
        hardness = Hardness(strength=strength, on=Negatives(section.hardness_on))
    return {
        "softmaxes": SOFTMAXES[section.softmaxes],
        "false_negatives": false_negatives,
        "hardness": hardness,
    }
