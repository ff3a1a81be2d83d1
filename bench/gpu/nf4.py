"""4-bit layers, and whether they compute here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.gpu.checks import message_of
from bench.gpu.options import Options
from bench.harness import say


def no_nf4(options: Options) -> str | None:
    """Why there are no 4-bit weights here; None if there are."""
    try:
        import bitsandbytes as bnb

        bare = nn.Linear(64, 64, bias=False, device="meta")
        layer = four_bit(bare, torch.float32, True, options.device)
        x = torch.ones(2, 64, device=options.device, requires_grad=True)
        out = layer(x)
        torch.autograd.backward(out.sum())
        assert bool(out.isfinite().all()), "its result is no number"
        say(f"  bitsandbytes {bnb.__version__} computes on {options.device}")
    except Exception as error:
        return message_of(error)
    return None


def four_bit(linear: Any, dtype: torch.dtype, double: bool, device: torch.device) -> Any:
    """An NF4 layer of random weights in the place of a linear layer without any."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    size = (linear.out_features, linear.in_features)
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=double,
        quant_type="nf4",
        device="meta",
    )
    weight = torch.empty(size, dtype=dtype, device=device).normal_(std=0.02)
    layer.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
    ).to(device)
    if linear.bias is not None:  # else it would have torch's default dtype
        layer.bias = nn.Parameter(torch.empty_like(linear.bias), requires_grad=False)
    return layer
