"""Models of real size with random weights, made on the device one matrix at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.nf4 import four_bit
from lowmem_cft.model.adapter import attach_adapter, linear_names
from lowmem_cft.model.configs import config_without_weights
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.precision import keep_weight_layout
from lowmem_cft.planning.tracing import skeleton, with_layers
from lowmem_cft.recipe.schema import Recipe

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


def config_for(name: str, recipe: Recipe, tiny: bool) -> Any:
    """The model's shapes, or a small model of the same architecture."""
    if name == "LLaMA-8B":
        from transformers import LlamaConfig

        config: Any = LlamaConfig(**LLAMA_8B)
    else:
        config = config_without_weights(recipe.model)
    if not tiny:
        return config
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    config.hidden_size, config.intermediate_size, config.vocab_size = 128, 320, 128
    config.num_hidden_layers, config.num_attention_heads = 8, 4
    if groups is not None:
        config.num_key_value_heads = 4 if groups == heads else 1
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = 32
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, 1)
    return config


def build_base(config: Any, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> Any:
    """The recipe's base of random weights, made on the device one matrix at a time."""
    base = skeleton(config, dtype)
    if recipe.model.quantization == "nf4":
        for name in linear_names(base):
            parent, _, child = name.rpartition(".")
            linear = base.get_submodule(name)
            layer = four_bit(linear, dtype, recipe.model.double_quantization, device)
            setattr(base.get_submodule(parent), child, layer)
        base.is_loaded_in_4bit = True  # which peft asks
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(_filled(module, name, values), False)
    _fill_buffers(base, config, dtype, device)
    keep_weight_layout(base)
    base.requires_grad_(False)
    base.eval()
    return base


def _filled(module: nn.Module, name: str, values: Tensor) -> Tensor:
    """Values of a new model: norms pass on what comes in, biases are 0, the rest is random."""
    if values.ndim == 1:
        is_scale = name == "weight" and "Gemma" not in type(module).__name__  # Gemma's count from 1
        return values.fill_(float(is_scale))
    return values.normal_(std=0.02)


def _fill_buffers(base: Any, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Rotary frequencies and the like, which no checkpoint has: those of a model of one layer."""
    from transformers import AutoModel

    small = with_layers(config, 1)
    small.vocab_size = 8
    for key in ("intermediate_size", "ffn_dim"):
        if hasattr(small, key):
            setattr(small, key, 8)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, key, 1)
    real = dict(AutoModel.from_config(small, dtype=dtype).named_buffers())
    for name, _ in list(base.named_buffers()):
        owner, _, last = name.rpartition(".")
        base.get_submodule(owner)._buffers[last] = real[name].to(device)


def attach(base: Any, recipe: Recipe) -> Encoder:
    clock = DropoutClock(seed=recipe.train.seed)
    model = attach_adapter(base, recipe.lora, clock, seed=recipe.train.seed)
    section = recipe.embedding
    return Encoder(model, pooling=section.pooling, normalize=section.normalize, clock=clock)


def nudge_adapter(encoder: Encoder) -> None:
    """Make B something else than 0, so that no gradient is 0."""
    for name, parameter in encoder.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)


def weight_bytes(base: nn.Module) -> tuple[int, int]:
    """4-bit matrices with their scales, and everything else that is frozen."""
    quantized = plain = 0
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors = [parameter, state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
            quantized += sum(tensor.nbytes for tensor in tensors)
        elif "lora_" not in name:
            plain += parameter.nbytes
    return quantized, plain + sum(buffer.nbytes for buffer in base.buffers())
