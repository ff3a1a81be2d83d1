"""What a caller's settings and machine must not change, and what they rule out."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Products in the dtype of their inputs: without autocast, float32 without TF32 or bfloat16."""
    known = torch.amp.is_autocast_available(device_type)
    autocast_off = torch.autocast(device_type, enabled=False) if known else nullcontext()
    with autocast_off, _exact_float32():
        yield


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Restores each setting under its own name: torch refuses one set by an old name and a new."""
    cuda: Any = torch.backends.cuda.matmul
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    outer = cuda.fp32_precision, cpu.fp32_precision
    if not {"tf32", "bf16"} & {*outer}:
        yield
        return
    try:
        precision: str | None = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:
        precision = None
        cuda.fp32_precision = "ieee"
    cpu.fp32_precision = "ieee"
    try:
        yield
    finally:
        if precision is None:
            cuda.fp32_precision = outer[0]
        else:
            torch.set_float32_matmul_precision(precision)
        cpu.fp32_precision = outer[1]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; from a CPU to a GPU, the host waits for nothing that is queued there."""
    if is_gpu(device) and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def is_gpu(device: torch.device) -> bool:
    """A device that works off a queue."""
    return device.type == "cuda"


@functools.cache
def why_triton_cannot_start() -> str | None:
    """What keeps Triton's kernels from this machine's GPU; None if nothing does.

    Triton builds a small library when it first launches a kernel: it needs a C compiler and
    Python's headers, which many machines lack.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        from triton.runtime import driver  # type: ignore[import-untyped]

        driver.active.utils  # noqa: B018 (built when first read)
    except Exception as error:  # whatever a compiler, a linker or a driver says
        lines = str(error).strip().splitlines()
        return f"triton cannot start ({lines[0] if lines else type(error).__name__})"
    return None
