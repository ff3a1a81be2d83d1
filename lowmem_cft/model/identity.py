"""What tells one loaded model from another."""

from __future__ import annotations

import hashlib

import torch


def weights_digest(model: torch.nn.Module) -> str:
    """16 hexadecimal digits of all tensors: weights, buffers, and the scales of 4-bit weights.

    A checkpoint's state has the scales but not every buffer (rotary frequencies are made anew).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def lora_scaling(model: torch.nn.Module) -> float | dict[str, float] | None:
    """What LoRA layers multiply their product by (alpha / rank), which no weight tells.

    One number where all layers have the same, else one for each; None without an adapter.
    """
    if not hasattr(model, "peft_config"):
        return None
    from peft.tuners.lora.layer import LoraLayer

    of_layer = {
        f"{name}.{adapter}": float(layer.scaling[adapter])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for adapter in layer.active_adapters
    }
    first, *others = set(of_layer.values())
    return of_layer if others else first
