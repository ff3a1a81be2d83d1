"""The part that bounds the loss's memory."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.options import Options
from bench.gpu.parts import loss_memory


def test_memory_beyond_the_bound_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(torch.device("cpu"), True, 2**30, 100.0)
    assert loss_memory.measure_extra(options, (16, 32, 8), "one_way", "float32")["ok"]
    monkeypatch.setattr(loss_memory, "EXTRA_BYTES", 10)
    assert not loss_memory.measure_extra(options, (16, 32, 8), "one_way", "float32")["ok"]
    monkeypatch.setattr(loss_memory, "MEMORY_CASES", {True: (((16, 32, 8), "one_way", "float32"),)})
    assert not loss_memory.check(options)["ok"]


def test_the_largest_loss_fits_the_cap() -> None:
    """Inputs and gradients of it leave room for the formula's own, by the numbers."""
    (m, n, d), _, dtype = loss_memory.LARGEST
    assert (m, n, d) == (65536, 131072, 2304)
    held = (m + n) * d * (getattr(torch, dtype).itemsize + 4)
    assert held + loss_memory.EXTRA_BYTES < 12 * 2**30
