"""The training forward of a LoRA layer against peft's own: the same numbers, and less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem_cft.model.adapter import attach_adapter
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.patches import patched_layers
from lowmem_cft.recipe.schema import LoraSection

B, T, F, G = 3, 4, 10, 6


class Base(nn.Module):
    """One linear layer, as a base model of which peft knows nothing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(F, G).to(dtype).requires_grad_(False)
        self.dtype = dtype

    def forward(self, x_BTF: Tensor) -> Tensor:
        out_BTG: Tensor = self.linear(x_BTF)
        return out_BTG


def adapted(dropout: float, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    clock = DropoutClock(seed=3, step=1)
    section = LoraSection(rank=2, alpha=6.0, dropout=dropout, targets=["linear"])
    model = attach_adapter(Base(dtype), section, clock, seed=0)
    clock.set_chunk(torch.arange(B), torch.arange(T).expand(B, T))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)  # B is zero at the start and would hide errors
    return model.train()


def run(model: Any, x_BTF: Tensor) -> tuple[list[Tensor], int]:
    """The output, the gradients of the input and of both matrices; how many numbers were kept."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.is_leaf else tensor.numel()
        return tensor

    model.zero_grad()
    x_BTF = x_BTF.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out_BTG = model.base_model.model(x_BTF)
    out_BTG.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert x_BTF.grad is not None
    return [out_BTG.detach(), x_BTF.grad, *gradients], kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_numbers_as_pefts_own(dropout: float) -> None:
    model = adapted(dropout)
    x_BTF = torch.randn(B, T, F, dtype=torch.float64)
    lean, lean_kept = run(model, x_BTF)
    with patched_layers(model).lifted("forward"):
        plain, plain_kept = run(model, x_BTF)
    for ours, theirs in zip(lean, plain, strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert lean_kept < plain_kept or not dropout


def test_a_16_bit_base_is_not_widened() -> None:
    model = adapted(0.3, torch.bfloat16)
    x_BTF = torch.randn(B, T, F).bfloat16()
    (out_BTG, *gradients), _ = run(model, x_BTF)
    assert out_BTG.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients[1:]} == {torch.float32}


def test_evaluation_and_a_switched_off_adapter_are_pefts() -> None:
    model = adapted(0.3)
    x_BTF = torch.randn(B, T, F, dtype=torch.float64)
    with model.disable_adapter():
        assert torch.equal(
            model.base_model.model(x_BTF), Base.forward(model.base_model.model, x_BTF)
        )
    model.eval()
    patched = model.base_model.model(x_BTF)
    with patched_layers(model).lifted():
        assert torch.equal(model.base_model.model(x_BTF), patched)
