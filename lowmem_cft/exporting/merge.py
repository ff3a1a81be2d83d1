"""A backbone and its adapter become one model in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lowmem_cft.model.configs import base_model_kwargs
from lowmem_cft.model.encoder import Encoder


def _plain_weight(module: nn.Module) -> torch.Tensor:
    """A linear layer's weight in float32, de-quantised if it is 4-bit."""
    weight = module.weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    assert isinstance(weight, torch.Tensor)
    return weight.detach().float()


def merged_model(encoder: Encoder, dtype: torch.dtype) -> Any:
    """A plain model whose weights are the (de-quantised) base plus the adapter, rounded once."""
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModel
    from transformers.pytorch_utils import Conv1D

    trained = encoder.model.get_base_model()
    config = type(trained.config).from_dict(trained.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModel.from_config(config, dtype=dtype, **base_model_kwargs(config))
    state: dict[str, torch.Tensor] = {}
    inside_lora = tuple(
        f"{name}." for name, m in trained.named_modules() if isinstance(m, LoraLayer)
    )
    for name, module in trained.named_modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            delta = module.get_delta_weight("default").detach().float()
            state[f"{name}.weight"] = _plain_weight(base) + delta.to(base.weight.device)
            if getattr(base, "bias", None) is not None:
                state[f"{name}.bias"] = base.bias.detach()
        elif isinstance(module, nn.Linear) and not name.startswith(inside_lora):
            state[f"{name}.weight"] = _plain_weight(module)
    for name, value in (*trained.named_parameters(), *trained.named_buffers()):
        if name not in state and not name.startswith(inside_lora) and value.is_floating_point():
            state[name] = value.detach()
    names = plain.state_dict().keys()
    state = {name: value.cpu().to(dtype) for name, value in state.items() if name in names}
    for name, module in plain.named_modules():
        held = trained.get_submodule(name)
        held = held.get_base_layer() if isinstance(held, LoraLayer) else held
        if isinstance(module, Conv1D) and not isinstance(held, Conv1D):
            # in 4 bits it lies as a linear layer's
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not missing + unexpected, f"merge: {missing[:3]} {unexpected[:3]}"
    return plain
