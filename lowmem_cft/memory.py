"""The machine's memory: how much is free, how much was used."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

HEADROOM = 0.9
"""Share of the free memory that is planned with: other processes live on this machine too."""

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: on the device, or available RAM for the CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    import psutil

    return int(psutil.virtual_memory().available)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free, for the next ones. On Linux; elsewhere nothing happens.

    Otherwise every large tensor comes from the system and goes back to it, and its pages are
    zeroed again each time.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def grow_cuda_blocks(device: torch.device) -> None:
    """Have CUDA's allocator enlarge its blocks, which chunks of unequal sizes would fragment.

    Call it before anything is allocated there. What a user says in torch's own environment
    variables stays. Off Linux torch has no such blocks, and nothing happens.

    In blocks of fixed sizes a step of MiniCPM-2B reserved 17 % more than it allocated, and had to
    give all of them back and allocate anew (docs/log.md).
    """
    if device.type != "cuda" or not sys.platform.startswith("linux"):
        return
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        # torch's setter at run time; its older public-looking name warns that it is this one now
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on a CUDA device, resident in this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: on Linux its figure starts at the peak of whoever started this process.
        lines = status.read_text(encoding="ascii").splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return kib * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
