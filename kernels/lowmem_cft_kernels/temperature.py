"""A temperature that is learned within bounds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LearnedTemperature(nn.Module):
    """A temperature trained like any weight, always strictly between two bounds.

        log temperature = log low + (log high - log low) sigmoid(raw)

    A clamped parameter has no gradient once it is outside and can be stuck there; this one always
    has one.

    Args:
        initial: its first value.
        low, high: 0 < low < initial < high.

    Raises:
        ValueError: they are not in that order.
    """

    def __init__(self, initial: float = 0.05, low: float = 0.005, high: float = 1.0) -> None:
        super().__init__()
        if not 0 < low < initial < high < math.inf:
            raise ValueError(
                f"got low {low}, initial {initial}, high {high}, wanted 0 < low < initial < high"
            )
        self.log_low, self.log_span = math.log(low), math.log(high / low)
        share = (math.log(initial) - self.log_low) / self.log_span
        self.raw = nn.Parameter(torch.tensor(math.log(share / (1 - share))))

    def forward(self) -> Tensor:
        """The temperature, a scalar, differentiable in `raw`."""
        return torch.exp(self.log_low + self.log_span * torch.sigmoid(self.raw))
