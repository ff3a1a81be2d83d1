"""The device that work is done on."""

from __future__ import annotations

import torch
from torch import Tensor

AMPERE = (8, 0)
"""The compute capability from which on cards have bfloat16 and a flash kernel of attention."""


def compute_capability(device_type: str) -> tuple[int, int] | None:
    """That of this machine's CUDA device, `AMPERE` where it has none; None for another device."""
    if device_type != "cuda":
        return None
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else AMPERE


def is_gpu(device: torch.device) -> bool:
    """A device that works off a queue."""
    return device.type == "cuda"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; from the host to a GPU by way of pinned memory.

    A copy from pinned memory takes its place in the device's queue, where any other copy has the
    host wait until the queue is empty.
    """
    if is_gpu(device) and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
