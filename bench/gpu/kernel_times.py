"""Which kernels a piece of work spends its time in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.device import synchronize, timed

_NAME = 120
"""Characters of a kernel's name that are kept: templates are longer than anyone reads."""


def kernels_of(work: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """Name of each kernel -> its calls and microseconds, in one run after one that does not count.

    On a CPU operations, each without those that it calls.
    """
    work()
    synchronize(device)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        work()
        synchronize(device)
    by_name: dict[str, tuple[int, float]] = {}
    for event in profiler.key_averages():
        if event.device_type.name.lower() != device.type:
            continue
        taken = event.self_device_time_total if cuda else event.self_cpu_time_total
        calls, so_far = by_name.get(event.key, (0, 0.0))
        by_name[event.key] = (calls + event.count, so_far + taken)
    return by_name


def dearest(kernels: dict[str, tuple[int, float]], count: int = 25) -> list[dict[str, Any]]:
    """The `count` that take longest, with their share of all of them."""
    total = sum(taken for _, taken in kernels.values()) or 1.0
    ordered = sorted(kernels.items(), key=lambda item: -item[1][1])
    return [
        {
            "name": name[:_NAME],
            "calls": calls,
            "microseconds": round(taken, 1),
            "share": round(taken / total, 4),
        }
        for name, (calls, taken) in ordered[:count]
    ]


def profiled(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The dearest kernels of some work, how many there are, and its time beside theirs."""
    kernels = kernels_of(work, device)
    seconds, _ = timed(work, device)
    return {
        "microseconds": round(1e6 * seconds, 1),
        "busy_microseconds": round(sum(taken for _, taken in kernels.values()), 1),
        "num_kernels": sum(calls for calls, _ in kernels.values()),
        "kernels": dearest(kernels),
    }
