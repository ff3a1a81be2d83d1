"""The check's time starts with a test, not with its process."""

from __future__ import annotations

import time

import pytest

from bench.gpu import check


@pytest.fixture(autouse=True)
def _started_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "STARTED", time.perf_counter())
