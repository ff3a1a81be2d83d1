"""Benchmarks at tiny sizes leave nothing behind for other tests."""

from __future__ import annotations

import pytest

from bench import device, encode, st_losses
from bench.loss import __main__ as loss


@pytest.fixture(autouse=True)
def _leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device.PEAK_SIZE, "cpu", 64)
    for module in (encode, loss, st_losses):  # it would last for all other tests
        monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
