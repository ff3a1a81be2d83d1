"""A process that takes all of a GPU's memory but so much, and holds it: another then sees a small card.

    python bench/gpu/ballast.py --leave-bytes 12562808832

A limit of the allocator alone is not that: context, modules and workspaces of libraries would still
see the whole card. The process prints one line of JSON once it holds the memory, and ends when its
standard input does, so that it cannot outlive the one that started it.

On a CPU it holds a little memory and does the same otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

_BLOCK = 2 * 2**20
"""What CUDA hands out at least."""

_CPU_BYTES = 2**20
_START_SECONDS = 60.0
_END_SECONDS = 10.0


@dataclass(frozen=True)
class Ballast:
    """What the process holds, and what of the device was then free and in use, all in bytes."""

    held_bytes: int
    free_bytes: int
    used_bytes: int


@contextmanager
def ballast(*, cuda: bool, leave_bytes: int) -> Iterator[Ballast]:
    """While entered, the GPU has `leave_bytes` free for all that is not there yet.

    To be entered before this process touches the GPU, whose context is to be within them.

    Raises:
        RuntimeError: the process could not take the memory.
    """
    command = [sys.executable, str(Path(__file__)), "--leave-bytes", str(leave_bytes)]
    command += [] if cuda else ["--cpu"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    watch = threading.Timer(_START_SECONDS, process.kill)
    watch.start()
    try:
        line = process.stdout.readline()
        watch.cancel()
        if not line:
            raise RuntimeError(
                f"the ballast's process took no memory; it ended with {process.wait()}"
            )
        yield Ballast(**json.loads(line))
        if process.poll() is not None:
            raise RuntimeError(
                f"the ballast's process ended early, with {process.returncode}: what was measured "
                "beside it had the whole card"
            )
    finally:
        watch.cancel()
        process.stdin.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def take(leave_bytes: int) -> list[Tensor]:
    """Blocks of the GPU that leave so many bytes free, or less than one block more."""
    held: list[Tensor] = []
    size = _to_take(leave_bytes)
    while size >= _BLOCK:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            size = _to_take(leave_bytes)
        except torch.OutOfMemoryError:  # not in one piece
            size = min(size // 2, _to_take(leave_bytes)) // _BLOCK * _BLOCK
    return held


def _to_take(leave_bytes: int) -> int:
    free, _ = torch.cuda.mem_get_info()
    return max(0, free - leave_bytes) // _BLOCK * _BLOCK


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--leave-bytes", type=int, required=True)
    parser.add_argument("--cpu", action="store_true")
    values = parser.parse_args()
    if values.cpu:
        held, free, total = [torch.zeros(_CPU_BYTES, dtype=torch.uint8)], 0, 0
    else:
        held = take(values.leave_bytes)
        free, total = torch.cuda.mem_get_info()
    taken = Ballast(sum(x.nbytes for x in held), free, total - free)
    print(json.dumps(asdict(taken)), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
