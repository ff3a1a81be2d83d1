"""Weights as they are weighed, from shapes alone, against those of a loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.recipe.schema import ModelSection
from measured_steps import make_recipe
from plain import make_encoder
from tiny import save_tiny, tiny_config


@pytest.mark.parametrize("double", [True, False])
def test_weights_are_weighed_as_loaded(double: bool, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    folder = save_tiny(tmp_path / "opt", "opt")
    section = ModelSection(
        id=str(folder), quantization="nf4", double_quantization=double, dtype="fp32"
    )
    base = load_backbone(section, torch.device("cpu")).model
    encoder = make_encoder(dtype=torch.float32, base=base)
    quantized = 0
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors = [module.weight, state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
            quantized += sum(tensor.nbytes for tensor in tensors)
    made = make_recipe(model={"quantization": "nf4", "double_quantization": double})
    weights = Footprint(made, tiny_config("opt"), torch.float32, 16, "cpu").weights
    assert quantized > 0
    assert weights.quantized_bytes == quantized
    plain = [p for n, p in base.named_parameters() if "lora" not in n and p.dtype.is_floating_point]
    assert weights.plain_bytes == sum(p.nbytes for p in [*plain, *base.buffers()])
    trained = [p for p in encoder.model.parameters() if p.requires_grad]
    assert weights.num_trained == sum(p.numel() for p in trained)
