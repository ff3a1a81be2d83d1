"""What tells one loaded model from another: every value of its weights, and the adapter's scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.model.adapter import attach_adapter
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.identity import lora_scaling, weights_digest
from lowmem_cft.recipe.schema import LoraSection, ModelSection


def test_weights_digest_tells_models_apart() -> None:
    def digest(seed: int, scale: float = 1) -> str:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).bfloat16())
        model[1].bias.data.mul_(scale)
        return weights_digest(model)

    assert digest(0) == digest(0)
    assert len({digest(0), digest(1), digest(0, 2)}) == 3


def test_weights_digest_reads_every_value() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.LayerNorm(2))
    model.register_buffer("frequencies", torch.ones(600), persistent=False)
    seen = {weights_digest(model)}
    for tensor in (model[0].weight, model[0].bias, model[1].weight, model.frequencies):
        assert isinstance(tensor, torch.Tensor)
        tensor.data.flatten()[-1] += 1e-3
        seen.add(weights_digest(model))
    assert len(seen) == 5


def test_weights_digest_reads_4_bit_weights_and_their_scales(tiny_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    section = ModelSection(id=str(tiny_folder), dtype="fp32", double_quantization=False)
    model = load_backbone(section, torch.device("cpu")).model
    weight = model.layers[2].mlp.up_proj.weight
    assert weight.dtype == torch.uint8
    loaded = weights_digest(model)
    assert weights_digest(model) == loaded
    weight.quant_state.absmax[-1] *= 2
    scaled = weights_digest(model)
    weight.data[-1] += 1
    assert len({loaded, scaled, weights_digest(model)}) == 3


def test_the_scaling_of_an_adapter_is_part_of_a_model(tiny_folder: Path) -> None:
    section = ModelSection(id=str(tiny_folder), quantization="none", dtype="fp32")

    def adapted(alpha: float) -> Any:
        model = load_backbone(section, torch.device("cpu")).model
        assert lora_scaling(model) is None
        return attach_adapter(model, LoraSection(rank=4, alpha=alpha), DropoutClock(0), seed=0)

    model_a, model_b = adapted(8), adapted(16)
    assert weights_digest(model_a) == weights_digest(model_b)
    assert (lora_scaling(model_a), lora_scaling(model_b)) == (2.0, 4.0)
    model_a.base_model.model.layers[1].self_attn.q_proj.scaling["default"] = 3.0
    scaling = lora_scaling(model_a)
    assert isinstance(scaling, dict)
    (changed,) = [name for name, value in scaling.items() if value == 3.0]
    assert "layers.1.self_attn.q_proj" in changed
    assert set(scaling.values()) == {2.0, 3.0}
