"""Whether tokens see those behind them is found by trying, and known before there are weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bidirectional import BIDIRECTIONAL, build
from lowmem_cft.model.causality import declared_bidirectional, needs_mask
from lowmem_cft.planning.tracing import skeleton
from plain import make_encoder
from tiny import FAMILIES, SIZES, tiny_config


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_bidirectional_models_are_known_with_and_without_weights(family: str) -> None:
    config = BIDIRECTIONAL[family]()
    assert needs_mask(build(config, torch.float32))
    assert declared_bidirectional(skeleton(config, torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_models_are_known_with_and_without_weights(family: str) -> None:
    config = tiny_config(family)
    assert not needs_mask(build(config, torch.bfloat16))
    assert not declared_bidirectional(skeleton(config, torch.float32))


def test_an_encoder_that_is_made_a_decoder_is_causal() -> None:
    config = BIDIRECTIONAL["bert"]()
    config.is_decoder = True
    assert not needs_mask(build(config))
    assert not declared_bidirectional(skeleton(config, torch.float32))


def test_what_is_computed_counts_and_not_what_is_declared() -> None:
    """Mamba has no attention that could heed the flag."""
    import transformers as t

    config = t.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2)
    config.is_causal = False
    model = build(config)
    assert declared_bidirectional(model)
    assert not needs_mask(model)


@pytest.mark.parametrize("maker", ["ConvBertConfig", "FNetConfig"])
def test_a_model_that_mixes_padding_in_is_refused(maker: str) -> None:
    import transformers as t

    model = build(getattr(t, maker)(**SIZES, intermediate_size=128))
    with pytest.raises(ValueError, match=r"lets padding into its texts in spite of the mask"):
        needs_mask(model)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_trying_draws_nothing_and_leaves_the_clock_alone(family: str) -> None:
    encoder: Any = make_encoder(family, 0.3)
    state, key_L = torch.get_rng_state(), encoder.clock.token_key_L
    encoder.model.train()
    assert not needs_mask(encoder.model)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.clock.token_key_L is key_L
    assert not any(module.training for module in encoder.model.modules())


def test_numbers_that_are_not_finite_are_said() -> None:
    model = build(tiny_config("llama"), torch.float32)
    model.get_input_embeddings().weight.data.fill_(torch.inf)
    with pytest.raises(
        ValueError, match=r"model.dtype: what LlamaModel computes is not finite in fl"
    ):
        needs_mask(model)
