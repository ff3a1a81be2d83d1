"""Costs of chunks by tracing: a model's depth and its chunks' shapes are scaled to, not traced."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
from transformers import XLMConfig

from bidirectional import BIDIRECTIONAL
from lowmem_cft.model import lora as lora_layers
from lowmem_cft.model.attention import Backend
from lowmem_cft.planning.tracing import (
    Checkpointing,
    CostModel,
    Tracer,
    cost_model,
    skeleton,
    with_layers,
)
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


def costs_of(config: Any, **values: Any) -> CostModel:
    options = {"dtype": torch.bfloat16, "lora": LORA, "pooling": "mean", "normalize": True}
    options |= {"checkpointing": "none", "longest": 64, "capability": (9, 0)}
    return cost_model(config, **(options | values))


@pytest.mark.parametrize("family", [name for name in BIDIRECTIONAL if name != "deberta-v2"])
def test_a_model_that_needs_a_mask_is_traced_with_it(family: str) -> None:
    costs = costs_of(BIDIRECTIONAL[family]())
    assert all(call.masked for call in costs.attention)
    assert set(costs.attention.values()) <= {Backend.EFFICIENT}
    assert bool(costs.attention) != (family == "mpnet"), "MPNet alone attends by its own code"


def test_masks_are_held_by_every_layer() -> None:
    """As the kernel takes them, two bytes for each pair of tokens of a text."""
    causal, masked = wide_config("llama"), wide_config("llama")
    masked.is_causal = False
    short, long = (
        costs_of(masked)(num_texts, width).graph_bytes
        - costs_of(causal)(num_texts, width).graph_bytes
        for num_texts, width in ((8, 64), (4, 128))  # as many tokens
    )
    pairs = 4 * 128 * 128 - 8 * 64 * 64
    assert long - short == pytest.approx(2 * causal.num_hidden_layers * pairs, rel=0.01)


def test_dropout_on_other_rows_than_tokens_is_refused() -> None:
    from transformers.models.deberta_v2 import modeling_deberta_v2

    if isinstance(modeling_deberta_v2.make_log_bucket_position, torch.jit.ScriptFunction):
        with pytest.raises(ValueError, match=r"TorchScript in this transformers, .* a newer one"):
            costs_of(BIDIRECTIONAL["deberta-v2"]())
        return  # as before transformers 5.23
    with pytest.raises(ValueError, match=r"lora.dropout: got 0.1, .* set it to 0"):
        costs_of(BIDIRECTIONAL["deberta-v2"]())
    config = BIDIRECTIONAL["deberta-v2"]()
    assert costs_of(config, lora=LoraSection(rank=4))(8, 64).graph_bytes > 0


def test_a_model_that_reads_numbers_is_refused() -> None:
    config = XLMConfig(vocab_size=64, emb_dim=64, n_layers=2, n_heads=4)
    with pytest.raises(ValueError, match=r"model.id: xlm models go by the numbers"):
        costs_of(config)


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


def test_what_is_listed_for_each_layer_has_as_many_entries() -> None:
    from transformers import SmolLM3Config

    config = SmolLM3Config(num_hidden_layers=3, no_rope_layer_interval=2)
    assert len(config.no_rope_layers) == 3
    assert len(with_layers(config, 5).no_rope_layers) == 5
    assert with_layers(config, 5).no_rope_layers[:3] == config.no_rope_layers
    assert with_layers(config, 2).architectures == config.architectures
