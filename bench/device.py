"""Time, memory and speed of work on a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.harness import median
from lowmem_cft.planning.live_bytes import LiveBytes

T = TypeVar("T")

PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the product that tells how fast a device multiplies, at most."""

_SLOW_MS = 100.0
"""A product that takes longer is not made larger."""


# -- time -----------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; a clock read before that lies."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of one call from an empty queue until the device has done all of it, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def elapsed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call from an empty queue; on CUDA by events around it."""
    if device.type != "cuda":
        return timed(work, device)[0] * 1e3
    from lowmem_cft_kernels import tune  # not where triton is missing

    return tune.elapsed_ms(work, device)


def seconds_of(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median of so many runs after one that does not count."""
    return median([timed(work, device)[0] for _ in range(repeats + 1)][1:])


def matrix_peak(dtype: torch.dtype, device: torch.device, largest: int | None = None) -> float:
    """FLOP/s of a large product, median of seven; of a smaller one where that takes long."""

    def times(size: int, repeats: int) -> list[float]:
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        return [elapsed_ms(lambda: torch.matmul(a, b, out=out), device) for _ in range(repeats)]

    largest = largest or PEAK_SIZE[device.type]
    size = largest // 8
    while size < largest and times(size, 2)[1] < _SLOW_MS:
        size *= 2
    return 2e3 * size**3 / median(times(size, 9)[2:])


# -- memory ---------------------------------------------------------------------------------------


def release() -> None:
    """Give freed device memory back, so that nobody runs out for what another has kept."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Count peak memory anew from here, where the system can (CUDA; CPU on Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")  # 5: the high-water mark (man 5 proc)


@contextmanager
def capped(device: torch.device, most_bytes: int) -> Iterator[None]:
    """The allocator limited to so many bytes on CUDA; elsewhere nothing happens."""
    if device.type != "cuda":
        yield
        return
    share = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(share, max(0, most_bytes) / total), device)
    try:
        yield
    finally:
        with suppress(torch.AcceleratorError):  # of a broken device, where it no longer matters
            torch.cuda.set_per_process_memory_fraction(share, device)


@dataclass
class Peak:
    """Bytes: `before`, and at most `allocated` while entered; `reserved` by the allocator.

    On a CPU tensors that operations return are counted, but for `known` ones, `held` bytes being
    there before. `emptied`: the allocator gives back first what it keeps, as `reserved` needs and
    times do not.
    """

    device: torch.device
    known: Sequence[Tensor] = ()
    held: int = 0
    emptied: bool = True
    before: int = 0
    allocated: int = 0
    reserved: int = 0

    @property
    def taken(self) -> int:
        """Most that was allocated beyond `before`."""
        return self.allocated - self.before

    def __enter__(self) -> Peak:
        if self.emptied:
            release()
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        self.before = self.held
        self._live = LiveBytes(self.known)
        self._live.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.allocated = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
            return
        self._live.__exit__(*error)  # type: ignore[no-untyped-call]
        self.allocated = self.reserved = self.before + self._live.peak
