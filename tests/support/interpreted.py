"""Runs cases of the loss by its Triton path in triton's interpreter, in a process of its own.

`interpret` is the call; the child is this file: `python interpreted.py GIVEN MADE`, with
TRITON_INTERPRET=1 before triton is imported. bfloat16 is rounded to, where the interpreter cuts
off. A job may be watched: then new memory holds NaN between guards, and every address that a kernel
reads or writes must be an element of one of the tensors that it was given.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loss_cases import Case
from lowmem_cft_kernels import InfoNCEResult, LossPath
from lowmem_cft_kernels.tiles import LOADS

SMALL_TILES = {
    "lse": {"block_r": 16, "block_c": 64, "block_d": 16, "num_warps": 4, "num_stages": 2},
    "gradient": {"block_r": 32, "block_c": 32, "block_d": 32, "num_warps": 4, "num_stages": 2},
}
"""Small, so that small matrices have several, ragged at each side."""


@dataclass(frozen=True)
class Job:
    """One call.

    Attributes:
        keywords: of `info_nce`, over the case's options.
        rows: most rows of a rectangle; as shipped if None.
        watched: see above.
        withheld: an argument of kernels whose last row the watch is not told of.
    """

    case: Case
    keywords: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    watched: bool = False
    withheld: str | None = None


@dataclass(frozen=True)
class Done:
    """What came of a job: the result, launches of each kernel, allocations and addresses seen."""

    result: InfoNCEResult
    launches: Mapping[str, int]
    allocated: int
    addresses: int


def interpret(folder: Path, jobs: Sequence[Job], *, small_tiles: bool = False) -> list[Done]:
    """The outcome of each job, in their order."""
    given, made = folder / "given.pt", folder / "made.pt"
    torch.save(list(jobs), given)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("LOWMEM_CFT_TILES", None)
    if small_tiles:
        entries = {
            f"{kernel}-{bits}-{load}": tile
            for kernel, tile in SMALL_TILES.items()
            for bits in (16, 32)
            for load in LOADS
        }
        environment["LOWMEM_CFT_TILES"] = str(folder / "tiles.json")
        (folder / "tiles.json").write_text(json.dumps({"80": entries}), encoding="utf-8")
    command = [sys.executable, __file__, str(given), str(made)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes: list[Done] = torch.load(made, weights_only=False)
    assert len(outcomes) == len(jobs) > 0
    return outcomes


# in the child


class _Guarded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """New memory holds NaN (or a large integer) and lies between guards that hold the same."""

    NAMES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    GUARD = 64

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.buffers: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in self.NAMES or not result.numel():
            return result
        assert result.is_contiguous()
        buffer = result.new_empty(result.numel() + 2 * self.GUARD)
        buffer.fill_(self._filler(buffer))
        self.buffers.append(buffer)
        return buffer[self.GUARD : -self.GUARD].view(result.shape)

    @staticmethod
    def _filler(buffer: Tensor) -> float | int | bool:
        if buffer.is_floating_point():
            return torch.nan
        return True if buffer.dtype == torch.bool else 99

    def check(self) -> None:
        """Nothing was written to the guards."""
        for buffer in self.buffers:
            for guard in (buffer[: self.GUARD], buffer[-self.GUARD :]):
                untouched = (
                    guard.isnan() if buffer.is_floating_point() else guard == self._filler(buffer)
                )
                assert bool(untouched.all()), f"written beside {buffer.dtype} {buffer.shape}"


class _Addresses:
    """What kernels may touch, and how often they did."""

    def __init__(self, withheld: str | None) -> None:
        self.withheld = withheld
        self.allowed = np.empty(0, dtype=np.uint64)
        self.seen = 0

    def allow(self, arguments: Mapping[str, Any]) -> None:
        """The elements of the tensors among these, and no others."""
        places = []
        for name, tensor in arguments.items():
            if not isinstance(tensor, Tensor):
                continue
            if name == self.withheld:
                tensor = tensor[:-1]
            offsets = torch.zeros((), dtype=torch.int64)
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                offsets = offsets[..., None] + torch.arange(size) * stride
            offsets = offsets.flatten() * tensor.element_size()
            places.append((tensor.data_ptr() + offsets.numpy()).astype(np.uint64))
        self.allowed = np.unique(np.concatenate(places))

    def check(self, pointers: Any, mask: Any) -> None:
        """Those that are not masked off."""
        touched = np.asarray(pointers)[np.asarray(mask, dtype=bool)].astype(np.uint64).ravel()
        at = np.searchsorted(self.allowed, touched).clip(max=len(self.allowed) - 1)
        outside = int((self.allowed[at] != touched).sum())
        assert not outside, f"{outside} addresses outside of the arguments"
        self.seen += touched.size


class _Kernel:
    """A kernel whose launches are counted; with addresses, they learn of its arguments."""

    def __init__(self, kernel: Any, addresses: _Addresses | None) -> None:
        self.kernel, self.addresses, self.count = kernel, addresses, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            self.count += 1
            if self.addresses is not None:
                self.addresses.allow(arguments)
            self.kernel[grid](**arguments)

        return launch


@contextmanager
def _checked_accesses(addresses: _Addresses) -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        addresses.check(ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses.check(ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", checked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checked_store),
    ):
        yield


@contextmanager
def _rounded_to_bfloat16() -> Iterator[None]:
    """To nearest, ties to even, as a GPU does it."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert: Any = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        rounded = torch.tensor(data, dtype=torch.float32).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    with mock.patch.object(interpreter, "_convert_float", converted):
        yield


def _run(job: Job) -> Done:
    from lowmem_cft_kernels import triton_info_nce

    addresses = _Addresses(job.withheld) if job.watched else None
    names = ("lse_kernel", "merge_kernel", "gradient_kernel", "scale_kernel")
    kernels = {name: _Kernel(getattr(triton_info_nce, name), addresses) for name in names}
    with ExitStack() as stack:
        stack.enter_context(_rounded_to_bfloat16())
        for name, kernel in kernels.items():
            stack.enter_context(mock.patch.object(triton_info_nce, name, kernel))
        if job.rows is not None:
            stack.enter_context(mock.patch.object(triton_info_nce, "RECTANGLE_ROWS", job.rows))
            stack.enter_context(mock.patch.object(triton_info_nce, "_FEWEST_ROWS", job.rows))
        guarded = None
        if addresses is not None:
            stack.enter_context(_checked_accesses(addresses))
            guarded = stack.enter_context(_Guarded())
        result = job.case.run(LossPath.TRITON, **job.keywords)
    if guarded is not None:
        guarded.check()
    return Done(
        result=result,
        launches={name: kernel.count for name, kernel in kernels.items()},
        allocated=0 if guarded is None else len(guarded.buffers),
        addresses=0 if addresses is None else addresses.seen,
    )


def main() -> None:
    from triton.runtime.interpreter import InterpretedFunction

    import interpreted
    from lowmem_cft_kernels.triton_tiles import lse_kernel

    assert isinstance(lse_kernel, InterpretedFunction)
    given, made = sys.argv[1:]
    # by the module that was imported: what is pickled is of it, not of __main__
    jobs = torch.load(given, weights_only=False)
    torch.save([interpreted._run(job) for job in jobs], made)


if __name__ == "__main__":
    main()
