"""Comparisons that say by how much, and guards against comparing nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Greatest absolute difference over the greatest wanted magnitude."""
    scale = wanted.abs().max().double().clamp(min=1e-300)
    return float((got.double() - wanted.double()).abs().max() / scale)


def vector_error(got: Tensor, wanted: Tensor, magnitude: float) -> float:
    """Norm of the difference over a magnitude."""
    return float((got.double() - wanted.double()).norm()) / magnitude


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_trained(by_name: Mapping[str, Tensor]) -> None:
    """An empty or all-zero set of gradients would pass any comparison."""
    assert by_name, "no gradients at all"
    assert all(bool(gradient.abs().max() > 0) for gradient in by_name.values())


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], bound: float) -> None:
    assert got.keys() == wanted.keys()
    assert_trained(wanted)
    for name, tensor in wanted.items():
        error = relative_error(got[name], tensor)
        assert error <= bound, f"{name}: relative error {error:.3e}, wanted at most {bound:.0e}"


def compute_norms_in_float64(model: nn.Module) -> None:
    """RMS norms of transformers compute in float32 whatever comes in: 1e-8 of noise in float64.

    Where a sum is regrouped by a last bit, such a rounding flips; this takes it away.
    """
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
        epsilon = getattr(module, "variance_epsilon", None) or module.eps

        def norm(x: Tensor, m: Any = module, o: float = offset, e: Any = epsilon) -> Tensor:
            out: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) * (m.weight + o)
            return out

        module.forward = norm
