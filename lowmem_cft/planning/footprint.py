"""What a model holds however a step is planned: weights, adapter, optimizer. From shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lowmem_cft.machine import compute_capability
from lowmem_cft.model.adapter import linear_names, target_modules
from lowmem_cft.model.quantized import four_bits
from lowmem_cft.planning.tracing import (
    Checkpointing,
    CostModel,
    cost_model,
    skeleton,
    with_layers,
)
from lowmem_cft.recipe.schema import LoraSection, ModelSection, Recipe

_NF4_BLOCK = 64  # weights that share a scale
_SCALE_BLOCK = 256  # scales that share a scale, where quantization is double
_CODE_BYTES = 16 * 4  # the table of 4-bit values, one per weight matrix
_SCALE_CODE_BYTES = 256 * 4 + 4  # the table and offset of 8-bit scales

OPTIMIZER_BYTES = {
    "adamw": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
}
"""Bytes per trained weight: two moments of 4 or 1 byte. Scales of 8-bit blocks are below 1 %."""


def nf4_bytes(numel: int, *, double_quantization: bool) -> int:
    """Bytes of one NF4 weight matrix as bitsandbytes holds it (QLoRA, arXiv 2305.14314)."""
    scales = -(-numel // _NF4_BLOCK)
    packed = (numel + 1) // 2
    if not double_quantization:
        return packed + 4 * scales + _CODE_BYTES
    return packed + scales + 4 * -(-scales // _SCALE_BLOCK) + _CODE_BYTES + _SCALE_CODE_BYTES


@dataclass(frozen=True)
class Weights:
    """What a model's weights take.

    Attributes:
        quantized_bytes, plain_bytes: bytes of frozen weights in 4 bits and in their own dtype.
        dequantized_bytes: bytes of the largest 4-bit matrix in the compute dtype, which is what it
            becomes while it is used.
        num_trained: how many weights are trained.
    """

    quantized_bytes: int
    plain_bytes: int
    dequantized_bytes: int
    num_trained: int


def weigh(config: Any, model: ModelSection, lora: LoraSection, dtype: torch.dtype) -> Weights:
    """Weigh a base model with its adapter.

    Raises:
        ValueError: `lora.targets` names no layer of it.
    """
    base: nn.Module = skeleton(config, dtype)
    held = four_bits(config, model)
    linears = {
        name
        for name in linear_names(base)
        if held is not None and held.holds(name, base.get_submodule(name))
    }
    quantized = plain = largest = 0
    for name, parameter in base.named_parameters():
        module, _, kind = name.rpartition(".")
        if held is not None and module in linears and kind == "weight":
            quantized += nf4_bytes(parameter.numel(), double_quantization=held.double)
            largest = max(largest, parameter.numel() * dtype.itemsize)
        else:
            plain += parameter.nbytes
    plain += sum(buffer.nbytes for buffer in base.buffers())
    adapted: list[Any] = [base.get_submodule(name) for name in target_modules(base, lora.targets)]
    trained = sum(lora.rank * sum(linear.weight.shape) for linear in adapted)
    return Weights(quantized, plain, largest, trained)


class Footprint:
    """The model of a recipe as the planner sees it: fixed bytes, and costs of chunks by tracing.

    Args:
        recipe: its model, lora and embedding sections count.
        config: the base model's transformers configuration.
        dtype: compute dtype.
        longest: tokens of the longest text.
        device_type: "cuda" or "cpu".
    """

    def __init__(
        self, recipe: Recipe, config: Any, dtype: torch.dtype, longest: int, device_type: str
    ) -> None:
        self.recipe, self.config, self.dtype, self.longest = recipe, config, dtype, longest
        self.device_type = device_type
        self.weights = weigh(config, recipe.model, recipe.lora, dtype)
        self._traced: dict[Checkpointing, CostModel] = {}

    def chunk_costs(self, checkpointing: Checkpointing) -> CostModel:
        """Costs of chunks with these layers checkpointed, traced when first asked for."""
        if checkpointing not in self._traced:
            self._traced[checkpointing] = cost_model(
                self.config,
                self.dtype,
                self.recipe.lora,
                self.recipe.embedding.pooling,
                normalize=self.recipe.embedding.normalize,
                checkpointing=checkpointing,
                longest=self.longest,
                capability=compute_capability(self.device_type),
            )
        return self._traced[checkpointing]

    @cached_property
    def dim(self) -> int:
        """D of an embedding."""
        return self.chunk_costs("none").dim

    @cached_property
    def can_checkpoint(self) -> bool:
        """Whether transformers can compute the architecture's layers again in the backward."""
        base = skeleton(with_layers(self.config, 1), self.dtype)
        return bool(base.supports_gradient_checkpointing)

    @property
    def num_layers(self) -> int:
        """The model's depth."""
        return int(self.config.num_hidden_layers)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter, or of its gradients, in float32."""
        return 4 * self.weights.num_trained

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return OPTIMIZER_BYTES[self.recipe.train.optimizer] * self.weights.num_trained
