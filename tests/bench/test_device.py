"""Peaks and times of work on a CPU."""

from __future__ import annotations

import pytest
import torch

from bench import device
from bench.device import Peak, elapsed_ms, matrix_peak, seconds_of, timed

CPU = torch.device("cpu")


def test_a_peak_is_what_was_alive_at_once() -> None:
    known = torch.zeros(1000)
    with Peak(CPU, [known], held=known.nbytes) as peak:
        for _ in range(3):
            known + 1  # gone before the next one comes
        both = [known + 1, known + 2]
    assert peak.before == 4000
    assert peak.taken == sum(x.nbytes for x in both) == 8000
    assert peak.allocated == peak.reserved == 12000


def test_times_and_results(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(device.time, "perf_counter", lambda: float(next(ticks)))
    assert timed(lambda: "result", CPU) == (1.0, "result")
    assert elapsed_ms(lambda: next(ticks), CPU) == 2000.0
    calls: list[int] = []

    def work() -> None:
        calls.append(0)
        for _ in calls:  # each takes longer than the one before it
            next(ticks)

    assert seconds_of(work, 3, CPU) == 4.0  # of 2, 3, 4 and 5 seconds, the first left out
    assert len(calls) == 4


def test_a_product_is_enlarged_until_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def taken(work: object, _: torch.device) -> float:
        monkeypatch.setattr(torch, "matmul", lambda a, b, out: sizes.append(len(a)))
        work()  # type: ignore[operator]
        return sizes[-1]  # ms: 1 for each row

    monkeypatch.setattr(device, "elapsed_ms", taken)
    assert matrix_peak(torch.float32, CPU, 512) == 2 * 128**3 / 0.128
    assert sorted(set(sizes)) == [64, 128]
