"""A loaded model in another precision, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def keep_weight_layout(model: nn.Module, keep: bool = True) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at a forward in evaluation mode.

    On CPUs with bf16 instructions it does so for speed. The packed layout rounds the scales to
    bf16, and a later step's backward would not know it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", not keep)  # noqa: B010 (not a Module's)


@contextmanager
def float32_arithmetic(model: nn.Module) -> Iterator[None]:
    """Compute in float32 from the weights as they are stored, and put everything back after.

    16-bit rounding differs with batch shapes and threads; in float32 two models that hold the
    same weights agree to many digits, so that what remains is a real difference.
    """
    halves = (torch.bfloat16, torch.float16)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in halves]
    dtypes = [tensor.dtype for tensor in tensors]
    layers: list[Any] = [m for m in model.modules() if getattr(m, "compute_dtype", None) in halves]
    compute = [layer.compute_dtype for layer in layers]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        for layer, dtype in zip(layers, compute, strict=True):
            layer.compute_dtype = dtype
