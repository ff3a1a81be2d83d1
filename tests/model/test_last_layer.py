"""The last layer is computed where it is read, in every family, and nowhere changes what is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BloomConfig, BloomModel

from bidirectional import BIDIRECTIONAL, build
from lowmem_cft.data.chunks import pad
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.patches import patched_layers
from plain import make_batch, make_encoder
from tiny import FAMILIES, SIZES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_less_arithmetic_and_the_same_embedding(family: str, side: str) -> None:
    batch = make_batch(4, 1, longest=12)
    encoder = make_encoder(family, 0.3)
    padded = pad(batch.store, np.arange(9), 3, "left" if side == "left" else "right")
    with torch.no_grad(), encoder.training_mode(1):
        with FlopCounterMode(display=False) as lean:
            got = encoder(padded)
        with (
            patched_layers(encoder.model).lifted("forward"),
            FlopCounterMode(display=False) as plain,
        ):
            wanted = encoder(padded)
    assert not torch.equal(got, torch.zeros_like(got))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    # of three layers' linear arithmetic, more than half of one layer's
    assert lean.get_total_flops() < 0.84 * plain.get_total_flops()


def test_the_first_token_alone_is_read_too() -> None:
    batch, config = make_batch(4, 1, longest=12), BIDIRECTIONAL["bert"]()
    encoder = make_encoder(dropout=0.3, pooling="cls", base=build(config))
    padded = pad(batch.store, np.arange(9), 3)
    with torch.no_grad(), encoder.training_mode(1):
        with FlopCounterMode(display=False) as lean:
            got = encoder(padded)
        with (
            patched_layers(encoder.model).lifted("forward"),
            FlopCounterMode(display=False) as plain,
        ):
            wanted = encoder(padded)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert lean.get_total_flops() < 0.84 * plain.get_total_flops()


def test_a_model_that_pads_further_is_computed_whole() -> None:
    """Longformer's rows are then not the chunk's."""
    from transformers import LongformerConfig

    config = LongformerConfig(
        **{**SIZES, "intermediate_size": 128, "attention_window": 8, "num_hidden_layers": 2}
    )
    encoder = make_encoder(pooling="cls", base=build(config))
    padded = pad(make_batch(4, 1, longest=12).store, np.arange(9), 3)
    assert padded.ids_BT.shape[1] % 8
    with torch.no_grad():
        wanted = encoder(padded)
        with encoder.training_mode(1):
            got = encoder(padded)
    assert float(wanted.std(dim=0).max()) > 0.1
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_mean_pooling_reads_everything() -> None:
    batch = make_batch(4, 1)
    flops = {}
    for pooling in ("mean", "eos"):
        encoder = make_encoder(pooling=pooling)
        with encoder.training_mode(1), FlopCounterMode(display=False) as counter:
            encoder(pad(batch.store, np.arange(9), 3))
        flops[pooling] = counter.get_total_flops()
    assert flops["eos"] < 0.9 * flops["mean"]


def test_evaluation_goes_through_transformers_own_layers() -> None:
    batch, encoder = make_batch(4, 1), make_encoder()
    padded = pad(batch.store, np.arange(9), 3)
    with torch.no_grad():
        with encoder.training_mode(1):
            encoder(padded)
        hidden = encoder.model(input_ids=padded.ids_BT).last_hidden_state
        with patched_layers(encoder.model).lifted("forward"):
            assert torch.equal(hidden, encoder.model(input_ids=padded.ids_BT).last_hidden_state)


def test_a_module_that_takes_more_is_computed_whole() -> None:
    """BLOOM's layers after attention add a residual, so that rows cannot be picked from x alone."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0)
    config.attention_dropout = 0.0
    encoder = Encoder(BloomModel(config).double().eval(), pooling="eos", normalize=True)
    padded = pad(make_batch(4, 1).store, np.arange(9), 3)
    with torch.no_grad():
        wanted = encoder(padded)
        with encoder.training_mode(1):
            got = encoder(padded)
    assert wanted.std() > 0
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
