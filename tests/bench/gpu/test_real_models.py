"""Models of real size: built as the planner weighs them, of the published sizes."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import real_models
from bench.gpu.options import MODELS
from lowmem_cft.model.adapter import linear_names, trainable_parameters
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.tracing import skeleton
from lowmem_cft.recipe.load import load_recipe


@pytest.mark.parametrize("name", ["MiniCPM-2B", "Gemma-2B", "Phi-2", "LLaMA-8B"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_models_are_built_as_the_planner_weighs_them(name: str, quantization: str) -> None:
    from transformers import AutoModel

    preset, overrides = MODELS[name]
    recipe = load_recipe(preset, [*overrides, f"model.quantization={quantization}"])
    config, device = real_models.config_for(name, recipe, True), torch.device("cpu")
    base = real_models.build_base(config, recipe, torch.bfloat16, device)
    linear = {type(base.get_submodule(n)).__name__ for n in linear_names(base)}
    assert linear == ({"Linear4bit"} if quantization == "nf4" else {"Linear"})
    weights = Footprint(recipe, config, torch.bfloat16, 150, "cpu").weights
    assert real_models.weight_bytes(base) == (weights.quantized_bytes, weights.plain_bytes)
    assert not any(tensor.is_meta for tensor in (*base.parameters(), *base.buffers()))
    real = dict(AutoModel.from_config(config, dtype=torch.bfloat16).named_buffers())
    assert real.keys() == dict(base.named_buffers()).keys()
    for key, buffer in base.named_buffers():
        torch.testing.assert_close(buffer, real[key], rtol=0, atol=0)
    encoder = real_models.attach(base, recipe)
    adapted = [m for m in encoder.model.modules() if "lora_A" in m._modules]
    assert len(adapted) == len(trainable_parameters(encoder.model)) // 2 > 0


def test_real_shapes_have_the_published_sizes() -> None:
    """Weights in thousand millions, embeddings included, without a separate head."""
    published = {"MiniCPM-2B": 2.72, "Gemma-2B": 2.51, "Phi-2": 2.65, "LLaMA-8B": 7.50}
    for name, wanted in published.items():
        preset, overrides = MODELS[name]
        config = real_models.config_for(name, load_recipe(preset, overrides), False)
        shapes = skeleton(config, torch.bfloat16)
        numel = sum(parameter.numel() for parameter in shapes.parameters())
        assert numel / 1e9 == pytest.approx(wanted, rel=0.01)
