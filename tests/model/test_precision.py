"""Float32 arithmetic for a while: nearer to wide weights, and everything as before afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.precision import float32_arithmetic, keep_weight_layout
from lowmem_cft.recipe.schema import ModelSection

IDS_BT = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 11, 12, 2]])


def load(folder: Path, **values: Any) -> Any:
    return load_backbone(ModelSection(id=str(folder), **values), torch.device("cpu")).model


def facts(model: Any) -> dict[str, Any]:
    """The dtype of every tensor, and the compute dtype of every 4-bit layer."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    layers = {name: getattr(m, "compute_dtype", None) for name, m in model.named_modules()}
    return {**{name: tensor.dtype for name, tensor in tensors.items()}, **layers}


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_float32_for_a_while(tiny_folder: Path, quantization: str) -> None:
    model = load(tiny_folder, dtype="bf16", quantization=quantization)
    dtypes = facts(model)
    hidden = model(input_ids=IDS_BT).last_hidden_state
    with float32_arithmetic(model):
        assert torch.bfloat16 not in facts(model).values()
        wide = model(input_ids=IDS_BT).last_hidden_state
    assert wide.dtype == torch.float32
    assert facts(model) == dtypes
    assert torch.equal(model(input_ids=IDS_BT).last_hidden_state, hidden)
    apart = float((wide - hidden.float()).abs().max())
    assert 0 < apart < 0.2, "16 bits round, and no more"


def test_an_error_inside_puts_everything_back(tiny_folder: Path) -> None:
    model = load(tiny_folder, dtype="bf16")
    dtypes = facts(model)
    with pytest.raises(KeyError), float32_arithmetic(model):
        raise KeyError
    assert facts(model) == dtypes


def test_4_bit_weights_keep_their_layout_until_they_need_not(tiny_folder: Path) -> None:
    model = load(tiny_folder, dtype="bf16")
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    keep_weight_layout(model, keep=False)
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)
