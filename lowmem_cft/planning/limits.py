"""How many bytes a run may take."""

from __future__ import annotations

import torch

from lowmem_cft import machine
from lowmem_cft.machine import choose_device
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.units import GIB, parse_bytes

MARGINS = {"cuda": GIB // 2, "cpu": 3 * GIB // 4}
"""Bytes that the process holds beside tensors: the CUDA context and cuBLAS; on a CPU the resident
libraries."""

HEADROOM = 0.9
"""Share of the free memory that is planned with: other processes live on this machine too."""


def plan_limit(recipe: Recipe, memory_option: str | None, device: str | None) -> tuple[str, int]:
    """The kind of device that is planned for, and how many bytes the run may take there.

    A limit that is given without a device is taken for a graphics card's. Where none is given the
    recipe's holds, and where that is `auto` what is free on this machine.

    Args:
        memory_option: the limit, such as "12GiB".
        device: "cuda" or "cpu".

    Raises:
        ValueError: the limit is no amount of memory, or a CUDA device's is asked for without one.
    """
    here = choose_device()
    if memory_option is not None:
        try:
            return device or "cuda", parse_bytes(memory_option)
        except ValueError as error:
            raise ValueError(f"`memory`: {error}") from None
    if recipe.memory.limit != "auto":
        return device or here.type, parse_bytes(recipe.memory.limit)
    if device not in (None, here.type):
        raise ValueError(f"`memory`: wanted a limit, since this machine has no {device} device")
    return here.type, free_limit(here)


def free_limit(device: torch.device) -> int:
    """Bytes that the whole run may take, from what is free on the device now."""
    # what is free is so beside libraries and context, which are in every prediction
    return int(HEADROOM * machine.free_bytes(device)) + MARGINS[device.type]


def run_limit(recipe: Recipe, device: torch.device) -> int:
    """Bytes that the whole run may take: the recipe's limit, and no more than is free."""
    free = free_limit(device)
    return free if recipe.memory.limit == "auto" else min(parse_bytes(recipe.memory.limit), free)


def cap_allocator(recipe: Recipe, device: torch.device) -> None:
    """Have CUDA's allocator refuse what is beyond the recipe's limit, where the recipe sets one."""
    if device.type != "cuda" or recipe.memory.limit == "auto":
        return
    tensors = parse_bytes(recipe.memory.limit) - MARGINS[device.type]
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, tensors) / total), device)
