"""LoRA layers in training: peft's arithmetic with fewer passes and less kept for the backward.

peft computes `base(x) + scaling * B(A(dropout(x)))` as it reads: on a 16-bit base it first widens x
to the adapter's float32, multiplies and adds in passes of their own, and autograd keeps the dropped
x of every layer. Here the branch runs in x's dtype (what autocast would do), product, scale and sum
are one `addmm`, and what is kept is x, which neighbouring layers share: dropout masks are computed
again in the backward.

Evaluation goes through peft's own forward, so that what is scored is what other loaders compute.

Shape suffixes: L tokens, F features in, G features out, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_cft.model.dropout import IdentityDropout
from lowmem_cft.model.patches import Patches
from lowmem_cft_kernels.dropout import identity_dropout


class _DroppedBranch(torch.autograd.Function):
    """base_LG + scaling * dropout(x_LF) A^T B^T, with x_LF and no mask kept."""

    @staticmethod
    def forward(
        ctx: Any,
        base_LG: Tensor,
        x_LF: Tensor,
        a_RF: Tensor,
        b_GR: Tensor,
        scaling: float,
        dropout: Callable[[Tensor], Tensor],
    ) -> Tensor:
        down_LR = dropout(x_LF) @ a_RF.T
        ctx.save_for_backward(x_LF, a_RF, b_GR, down_LR)
        ctx.scaling, ctx.dropout = scaling, dropout
        return torch.addmm(base_LG, down_LR, b_GR.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_LG,) = gradients
        x_LF, a_RF, b_GR, down_LR = ctx.saved_tensors
        d_down_LR = (d_LG @ b_GR).mul_(ctx.scaling)
        d_b_GR = (d_LG.T @ down_LR).mul_(ctx.scaling)
        d_a_RF = d_down_LR.T @ ctx.dropout(x_LF)
        d_x_LF = ctx.dropout(d_down_LR @ a_RF) if ctx.needs_input_grad[1] else None
        return d_LG, d_x_LF, d_a_RF, d_b_GR, None, None


def _add_branch(layer: Any, name: str, base: Tensor, x: Tensor) -> Tensor:
    """The adapter's share added to the base layer's output (..., G) for inputs (..., F)."""
    a_RF = layer.lora_A[name].weight.to(x.dtype)
    b_GR = layer.lora_B[name].weight.to(x.dtype)
    scaling, dropout = layer.scaling[name], layer.lora_dropout[name]
    x_LF, base_LG = x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1])
    if isinstance(dropout, IdentityDropout) and dropout.p > 0:
        key_L, key_F = dropout.keys(x_LF.shape[1])
        masked = partial(identity_dropout, key_L=key_L, key_F=key_F, rate=dropout.p)
        out_LG = _DroppedBranch.apply(  # type: ignore[no-untyped-call]
            base_LG, x_LF, a_RF, b_GR, scaling, masked
        )
    else:
        assert not isinstance(dropout, nn.Dropout), "a dropout that chunks would not repeat"
        out_LG = torch.addmm(base_LG, x_LF @ a_RF.T, b_GR.T, alpha=scaling)
    out: Tensor = out_LG.view(base.shape)
    return out


def _forward(layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    if not layer.training or layer.disable_adapters or layer.merged:
        return original(x, *args)
    out: Tensor = layer.base_layer(x, *args)
    for name in layer.active_adapters:
        out = _add_branch(layer, name, out, x.to(out.dtype))
    return out


def use_lean_layers(peft_model: nn.Module, patches: Patches) -> None:
    """Install the training forward of this module in every LoRA layer of linear layers."""
    from peft.tuners.lora.layer import LoraLayer

    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    assert layers, "no LoRA layers: peft has changed its layout"
    for layer in layers:
        assert not layer.use_dora.get("default", False), "DoRA is not this module's arithmetic"
        patches.install(layer, "forward", partial(_forward, layer, layer.forward))
