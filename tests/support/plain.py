"""The plain full-batch step: what every plan has to equal. And batches and encoders to try it on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lowmem_cft.data.batches import NO_TEXT, RowTable, StepTexts, step_texts
from lowmem_cft.data.chunks import pad
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.gradient.step import ContrastiveStep, StepReport, candidates_of
from lowmem_cft.model.adapter import attach_adapter, set_checkpointing, trainable_parameters
from lowmem_cft.model.configs import disable_base_dropout
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.patches import patched_layers
from lowmem_cft.recipe.schema import LoraSection, LossSection
from lowmem_cft_kernels import (
    Direction,
    FalseNegatives,
    Hardness,
    LearnedTemperature,
    LossOptions,
    Negatives,
)
from lowmem_cft_kernels.reference import reference_loss
from numerics import compute_norms_in_float64, gradients
from tiny import tiny_config

STEP = 7
PAD = 3


@dataclass(frozen=True)
class Batch:
    """Token ids and rows that point into them."""

    store: TokenStore
    table: RowTable

    def texts(self, *, twins_once: bool, hard_negatives: str = "batch") -> StepTexts:
        return step_texts(
            self.table,
            np.arange(len(self.table)),
            hard_negatives=hard_negatives,
            mask_duplicates=True,
            encode_twins_once=twins_once,
        )


class Stored(Protocol):
    """Something with texts' token ids."""

    @property
    def store(self) -> TokenStore: ...


def make_batch(
    rows: int, negatives: int, *, texts: int = 9, longest: int = 12, seed: int = 0
) -> Batch:
    """Random rows over few texts, so that many occur several times; ragged negatives."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, size=texts)
    store = TokenStore.from_lists([draw.integers(4, 40, size=n).tolist() for n in lengths])
    negative_NK = draw.integers(0, texts, size=(rows, negatives))
    negative_NK[draw.random((rows, negatives)) < 0.2] = NO_TEXT
    anchor_N, positive_N = draw.integers(0, texts, size=(2, rows))
    return Batch(store, RowTable(anchor_N, positive_N, negative_NK))


def make_encoder(
    family: str = "llama",
    dropout: float = 0.0,
    *,
    pooling: Any = "eos",
    dtype: torch.dtype = torch.float64,
    base: Any = None,
    targets: Any = "all-linear",
) -> Encoder:
    """A tiny random encoder with an adapter that is not zero anywhere."""
    from transformers import AutoModel

    torch.manual_seed(1)
    if base is None:
        config = tiny_config(family)
        disable_base_dropout(config)
        base = AutoModel.from_config(config).to(dtype)
    draw = torch.Generator().manual_seed(3)
    return with_adapter(base, dropout, pooling=pooling, draw=draw, targets=targets)


def with_adapter(
    base: Any,
    dropout: float,
    *,
    pooling: Any,
    draw: torch.Generator,
    targets: Any = "all-linear",
    round_to: torch.dtype | None = None,
) -> Encoder:
    """An encoder around a base model with an adapter that is not zero anywhere.

    `round_to`: a dtype that the adapter's weights are rounded to.
    """
    base.requires_grad_(False)
    if base.dtype == torch.float64:
        compute_norms_in_float64(base)
    section = LoraSection(rank=4, dropout=dropout, targets=targets)
    clock = DropoutClock(seed=5)
    model = attach_adapter(base, section, clock, seed=2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # B is zero at the start, which would hide errors in the gradient of A. Drawn in
            # float32 whatever the dtype, so that models of two dtypes have one adapter.
            drawn = 0.05 * torch.randn(parameter.shape, generator=draw)
            parameter.data.copy_(drawn.to(round_to or torch.float32))
    return Encoder(model, pooling=pooling, normalize=True, clock=clock)


LOSS = LossSection(temperature=0.1)


def reference_options(section: LossSection) -> dict[str, Any]:
    """What the recipe says, as arguments of the reference: written apart from the trainer's own."""
    margin = section.false_negative_margin
    one_way, back = Direction.QUERY_TO_DOC, Direction.DOC_TO_QUERY
    others = {Direction.QUERY_TO_QUERY, Direction.DOC_TO_DOC}
    return {
        "softmaxes": {
            "one_way": [{one_way}],
            "symmetric": [{one_way}, {back}],
            "gte": [{one_way, back} | others],
            "qwen3": [{one_way} | others],
        }[section.softmaxes],
        "false_negatives": None
        if margin is None
        else FalseNegatives(margin=margin, relative=section.false_negative_relative),
        "hardness": Hardness(strength=section.hardness, on=Negatives(section.hardness_on)),
    }


def plain_gradients(
    encoder: Encoder,
    batch: Stored,
    texts: StepTexts,
    loss: LossSection = LOSS,
    temperature: Tensor | None = None,
    during: AbstractContextManager[Any] | None = None,
) -> dict[str, Tensor]:
    """Gradients of one forward over all texts at once and one backward, in the libraries' layers.

    `temperature` stands in for the recipe's and gets a gradient too, which is for the caller.
    `during` is entered for the step and nothing else.
    """
    encoder.model.zero_grad()
    set_checkpointing(encoder.model, 0)
    lifted = patched_layers(encoder.model).lifted("forward")
    with lifted, encoder.training_mode(STEP), during or nullcontext():
        padded = pad(batch.store, texts.text_P, PAD, "left")
        emb_SD = encoder(padded)[texts.place_S.to(encoder.device)]
        query_MD, doc_ND = emb_SD.tensor_split([texts.num_queries])
        value, _ = reference_loss(
            query_MD,
            doc_ND,
            candidates_of(texts).to(encoder.device),
            LossOptions(
                temperature=loss.temperature if temperature is None else temperature,
                **reference_options(loss),
            ),
        )
        torch.autograd.backward(value)
    return gradients(encoder.model)


def planned_gradients(
    encoder: Encoder,
    batch: Stored,
    texts: StepTexts,
    plan: StepPlan,
    *,
    loss: LossSection = LOSS,
    temperature: LearnedTemperature | None = None,
    gradient_scale: float = 1.0,
    during: AbstractContextManager[Any] | None = None,
) -> tuple[dict[str, Tensor], StepReport]:
    """Gradients of one step by the plan; `during` is entered for the step and nothing else."""
    step = ContrastiveStep(
        encoder,
        batch.store,
        PAD,
        loss,
        trainable_parameters(encoder.model),
        chunk_cost=2,
        temperature=temperature,
    )
    encoder.model.zero_grad()
    set_checkpointing(encoder.model, plan.checkpoint_every)
    with encoder.training_mode(STEP), during or nullcontext():
        report = step(texts, plan, gradient_scale=gradient_scale)
    return gradients(encoder.model), report
