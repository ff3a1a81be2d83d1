"""Costs of chunks by tracing: a model's depth and its chunks' shapes are scaled to, not traced."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from lowmem_cft.model import lora as lora_layers
from lowmem_cft.planning.tracing import Checkpointing, Tracer, cost_model, skeleton, with_layers
from lowmem_cft.recipe.schema import LoraSection
from measured_steps import wide_config

LORA = LoraSection(rank=4, dropout=0.1)


def tracer(checkpointing: Checkpointing, num_layers: int) -> Tracer:
    return Tracer(
        wide_config("llama"),
        torch.float32,
        LORA,
        "last",
        normalize=True,
        checkpointing=checkpointing,
        num_layers=num_layers,
        capability=None,
    )


@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_costs_of_a_depth_and_shape_that_were_not_traced(checkpointing: Checkpointing) -> None:
    """By six traces of 2 and 4 layers, against a trace of all 6 and of another chunk."""
    config = wide_config("llama")
    costs = cost_model(
        config,
        torch.float32,
        LORA,
        "last",
        normalize=True,
        checkpointing=checkpointing,
        longest=48,
        capability=None,
    )
    predicted, traced = costs(20, 40), tracer(checkpointing, config.num_hidden_layers).trace(20, 40)
    for cost, real in zip(astuple(predicted), astuple(traced), strict=True):
        assert 0.97 * real <= cost <= 1.1 * real
    assert traced.graph_bytes > 20 * 40 * config.hidden_size * 4  # a layer's input at the least


def test_dropout_is_itself_again_after_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    dropout, traced = lora_layers.identity_dropout, tracer("none", 2)
    traced.trace(2, 8)
    assert lora_layers.identity_dropout is dropout

    def fails(*_: object) -> None:
        assert lora_layers.identity_dropout is not dropout
        raise RuntimeError("stop")

    monkeypatch.setattr(traced, "_backward", fails)
    with pytest.raises(RuntimeError, match="stop"):
        traced.trace(2, 8)
    assert lora_layers.identity_dropout is dropout


def test_fewer_layers_repeat_the_pattern_and_leave_the_configuration_alone() -> None:
    config = wide_config("llama")
    config.layer_types = ["sliding_attention", "full_attention"] * 3
    short = with_layers(config, 3)
    assert short.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert (short.num_hidden_layers, config.num_hidden_layers) == (3, 6)


def test_a_skeleton_has_all_shapes_and_no_data() -> None:
    config = wide_config("llama")
    parameters = list(skeleton(config, torch.bfloat16).parameters())
    assert {(p.device.type, p.dtype, p.requires_grad) for p in parameters} == {
        ("meta", torch.bfloat16, False)
    }
    assert (config.vocab_size, config.hidden_size) in {tuple(p.shape) for p in parameters}
