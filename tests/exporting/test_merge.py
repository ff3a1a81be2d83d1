"""Merged weights are the base's, de-quantised, and the adapter's product, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.exporting.merge import merged_model
from lowmem_cft.model.adapter import attach_adapter
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import LoraSection, ModelSection
from tiny import tiny_tokenizer

IDS_BT = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 11, 12, 2]])


def adapted(folder: Path, quantization: Any, dtype: Any = "fp32", targets: Any = "mlp") -> Encoder:
    section = ModelSection(id=str(folder), dtype=dtype, quantization=quantization)
    model = load_backbone(section, torch.device("cpu")).model
    model = attach_adapter(model, LoraSection(rank=2, targets=targets), DropoutClock(), seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)  # B is zero at the start
    return Encoder(model, pooling="eos", normalize=True)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["mlp", "all-linear"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_merged_model_computes_the_same(
    tiny_folder: Path, quantization: str, targets: str
) -> None:
    encoder = adapted(tiny_folder, quantization, targets=targets)
    merged = merged_model(encoder, torch.float32).eval()
    ours = encoder.model(input_ids=IDS_BT).last_hidden_state
    torch.testing.assert_close(
        merged(input_ids=IDS_BT).last_hidden_state, ours, rtol=1e-3, atol=1e-4
    )
    with encoder.model.disable_adapter():
        base = encoder.model(input_ids=IDS_BT).last_hidden_state
    assert float((base - ours).abs().max()) > 0.05, "the adapter changes nothing"
    assert not hasattr(merged.config, "quantization_config")
    assert not any("lora" in name for name in merged.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gpt2s_transposed_weights_are_merged(tmp_path: Path, quantization: str) -> None:
    from transformers import AutoModel, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    encoder = adapted(tmp_path, quantization, targets="all-linear")
    merged = merged_model(encoder, torch.float32).eval()
    ours = encoder.model(input_ids=IDS_BT).last_hidden_state
    torch.testing.assert_close(
        merged(input_ids=IDS_BT).last_hidden_state, ours, rtol=1e-3, atol=1e-4
    )


def test_the_sum_is_rounded_once(tiny_folder: Path) -> None:
    encoder = adapted(tiny_folder, "none", "bf16")
    merged = merged_model(encoder, torch.bfloat16).state_dict()
    layer = encoder.model.get_base_model().layers[1].mlp.up_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    exact = layer.base_layer.weight.float() + layer.scaling["default"] * product
    rounded = exact.detach().bfloat16()
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert torch.equal(merged["layers.1.mlp.up_proj.weight"], rounded)
    twice = layer.base_layer.weight + (layer.scaling["default"] * product).bfloat16()
    assert not torch.equal(twice, rounded), "rounding twice would go unnoticed"
