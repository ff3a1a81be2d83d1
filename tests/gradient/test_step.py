"""A step queues its work on a GPU and waits for none of it.

Tensors of the meta device stand for a GPU's; see `syncs`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from bidirectional import BIDIRECTIONAL
from lowmem_cft import machine
from lowmem_cft.data.batches import RowTable, step_texts
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient import step
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.gradient.step import ContrastiveStep
from lowmem_cft.model.adapter import attach_adapter, set_checkpointing, trainable_parameters
from lowmem_cft.model.causality import declared_bidirectional
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.planning.tracing import skeleton
from lowmem_cft.recipe.schema import LoraSection, LossSection
from lowmem_cft_kernels import LossPath, info_nce
from syncs import HostWaits
from tiny import FAMILIES, tiny_config

ROWS = 12


@pytest.fixture(autouse=True)
def _meta_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_gpu", lambda device: device.type == "meta")
    chunked = functools.partial(
        info_nce, path=LossPath.CHUNKED
    )  # Triton asks the device what it is
    monkeypatch.setattr(step, "info_nce", chunked)


def encoder_without_data(family: str, checkpoint_every: int) -> Encoder:
    clock = DropoutClock()
    config = tiny_config(family) if family in FAMILIES else BIDIRECTIONAL[family]()
    base = skeleton(config, torch.float32)
    with torch.device("meta"):
        model = attach_adapter(base, LoraSection(rank=4, dropout=0.1), clock, seed=0)
    set_checkpointing(model, checkpoint_every)
    masked = declared_bidirectional(base)
    return Encoder(model, pooling="eos", normalize=True, clock=clock, masked=masked)


def texts_and_store() -> tuple[Any, TokenStore]:
    """Some texts twice in the step, so that slots have more than one level."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 20, size=3 * ROWS)
    store = TokenStore.from_lists([draw.integers(4, 60, size=n).tolist() for n in lengths])
    anchor, positive, negative = draw.integers(0, 3 * ROWS, (3, ROWS))
    texts = step_texts(
        RowTable(anchor, positive, negative[:, None]),
        np.arange(ROWS),
        hard_negatives="batch",
        mask_duplicates=True,
        encode_twins_once=True,
    )
    assert len(texts.text_P) < 3 * ROWS
    return texts, store


PLANS = {
    "none kept": {"kept_tokens": 0},
    "some kept": {"kept_tokens": 80},
    "checkpointed": {"checkpoint_every": 1},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", [*FAMILIES, "bert", "modernbert"])
def test_no_step_waits_for_the_device(family: str, plan: str) -> None:
    dials = StepPlan(**{"backward_tokens": 60, "forward_tokens": 120, **PLANS[plan]})
    encoder = encoder_without_data(family, dials.checkpoint_every)
    texts, store = texts_and_store()
    parameters = trainable_parameters(encoder.model)
    compute = ContrastiveStep(encoder, store, 3, LossSection(), parameters, chunk_cost=2)
    with HostWaits("meta") as waits, encoder.training_mode(0):
        report = compute(texts, dials)
    assert report.plan == dials
    assert all(parameter.grad is not None for parameter in parameters if parameter.requires_grad)
    assert waits.found == []


def test_a_step_that_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard of the test above: copies from memory that is not pinned."""
    monkeypatch.setattr(machine, "is_gpu", lambda device: False)
    encoder = encoder_without_data("llama", 0)
    texts, store = texts_and_store()
    compute = ContrastiveStep(
        encoder, store, 3, LossSection(), trainable_parameters(encoder.model), chunk_cost=2
    )
    with HostWaits("meta") as waits, encoder.training_mode(0):
        compute(texts, StepPlan(backward_tokens=60, forward_tokens=120))
    assert any("machine.py" in line for line in waits.found)
