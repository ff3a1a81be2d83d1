"""This machine: which device, which dtypes, how much memory is free or was used, which versions."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

AMPERE = (8, 0)
"""The compute capability from which on cards have bfloat16 and a flash kernel of attention."""


def compute_capability(device_type: str) -> tuple[int, int] | None:
    """(major, minor) of this machine's CUDA device, or of `AMPERE` where it has none.

    None for another kind of device, which has no such number.
    """
    if device_type != "cuda":
        return None
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else AMPERE


def is_gpu(device: torch.device) -> bool:
    """Whether the device works off a queue, as a CUDA device does."""
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the host to a GPU by way of pinned memory.

    A copy from pinned memory takes its place in the device's queue, where any other copy has the
    host wait until the queue is empty.
    """
    if is_gpu(device) and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


LIBRARIES = ("lowmem-cft", "torch", "transformers", "peft", "bitsandbytes", "numpy")
"""What computes a run's numbers."""


def library_versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of those libraries that are installed."""
    by_name = {"python": platform.python_version()}
    for name in names:
        with suppress(PackageNotFoundError):
            by_name[name] = version(name)
    return by_name


def processor_name() -> str:
    """The processor's model as Linux names it; elsewhere what Python knows of it."""
    info = Path("/proc/cpuinfo")
    lines = (
        info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The graphics card's name; of a CPU the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The recipe's compute dtype; auto takes bf16 where the device multiplies fast in it.

    A CPU without bf16 instructions is several times slower in it than in float32; a GPU before
    Ampere has float16 only.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as transformers and JSON files name it: `bfloat16`, not `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


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
    """Have glibc keep the memory of freed tensors for the next ones. Off Linux it does nothing.

    Otherwise every large tensor's memory comes from the system and goes back to it, and its pages
    are zeroed each time.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the system, and begin `peak_bytes` anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM, proc(5)


def grow_cuda_blocks(device: torch.device) -> None:
    """Have CUDA's allocator enlarge its blocks, which chunks of unequal sizes would fragment.

    Call it before anything is allocated there. What a user has set in torch's own environment
    variables stays. Off Linux torch has no such blocks, and this does nothing.

    With blocks of fixed sizes a step of MiniCPM-2B reserved 17 % more than it allocated, and had to
    give all of them back and allocate anew (docs/log.md).
    """
    if device.type != "cuda" or not sys.platform.startswith("linux"):
        return
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        # torch's setter at run time; its older public-looking name warns that it is this one now
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def peak_bytes(device: torch.device) -> int:
    """The most bytes held so far: allocated on a CUDA device, else resident in this process."""
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
