"""How many tokens a chunk may hold: measured on the model at hand, not taken from a table."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

HEADROOM = 0.7
"""Share of the free memory that is planned with; the rest is for allocator slack and peaks."""

FORWARD_FACTOR = 4
"""A chunk without a graph may hold this many times the tokens of one with it."""

_MAX_TOKENS = {"cpu": 1024, "cuda": 65536}  # beyond these a larger chunk is not faster
_MIN_TOKENS = 1024  # below this chunks are too small to be fast; checkpointing is cheaper
CHUNK_COST = {"cpu": 32, "cuda": 512}
"""Fixed time of a chunk (launches, de-quantisation) in tokens' worth."""


@dataclass(frozen=True)
class ChunkPlan:
    """Padded tokens per chunk with and without a graph, and whether layers are checkpointed."""

    backward_tokens: int
    forward_tokens: int
    checkpointing: bool


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated: on the device, or available RAM for the CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    import psutil

    return int(psutil.virtual_memory().available)


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


def graph_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, weights not counted.

    Each storage counts once, however many operations keep it.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice while counting

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    del output
    return sum(kept.values())


def plan_chunks(
    *,
    token_budget: int | None,
    checkpointing: bool | None,
    longest: int,
    reserved_bytes: int,
    free: int,
    device_type: str,
    graph_bytes_per_token: Callable[[bool], float],
) -> ChunkPlan:
    """Choose chunk sizes and checkpointing; None leaves the choice to measurement.

    Args:
        longest: tokens of the longest text.
        reserved_bytes: what the step needs besides activations (embeddings, optimizer, gradients).
        free: bytes free now.
        graph_bytes_per_token: measures them, with or without checkpointing.

    Raises:
        RuntimeError: not even one text of the greatest length fits.
    """
    if token_budget is not None:
        on = bool(checkpointing)
        return ChunkPlan(token_budget, token_budget * FORWARD_FACTOR, on)
    usable = free * HEADROOM - reserved_bytes
    needed = max(longest, _MIN_TOKENS)
    for on in (False, True) if checkpointing is None else (checkpointing,):
        per_token = graph_bytes_per_token(on)
        fits = int(usable / per_token)
        if fits >= needed:
            break
    if fits < longest:
        raise RuntimeError(
            f"a text of {longest} tokens needs about {longest * per_token / 2**30:.2f} GiB for its "
            f"graph, and {max(0.0, usable) / 2**30:.2f} GiB are free for it; lower text.max_tokens "
            "or train.logical_batch, set memory.checkpointing: on, or use model.quantization: nf4"
        )
    tokens = min(fits, _MAX_TOKENS.get(device_type, _MAX_TOKENS["cpu"]))
    tokens = max(tokens, longest)
    return ChunkPlan(tokens, tokens * FORWARD_FACTOR, on)
