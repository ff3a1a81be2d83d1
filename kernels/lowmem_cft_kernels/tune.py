"""Finds tiles for the present CUDA device, as a table that LOWMEM_CFT_TILES takes.

    python -m lowmem_cft_kernels.tune --out tiles.json
    LOWMEM_CFT_TILES=tiles.json python ...

For each entry of the table, candidates are put in its place and whole calls of `info_nce` timed:
calls with one pass for `lse`, with two for `gradient`. A candidate that does not fit the device, or
changes the numbers, is left out. What there was no time for keeps the tile it had.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.compiler.errors import CompilationError  # type: ignore[import-untyped]
from triton.runtime.errors import OutOfResources, PTXASError  # type: ignore[import-untyped]

from lowmem_cft_kernels.info_nce import value_and_gradients, why_not_triton
from lowmem_cft_kernels.masks import Candidates
from lowmem_cft_kernels.options import (
    ONE_WAY,
    SYMMETRIC,
    FalseNegatives,
    Hardness,
    LossOptions,
    LossPath,
)
from lowmem_cft_kernels.result import InfoNCEResult
from lowmem_cft_kernels.tiles import LOADS, Tile, capability_of, room_bytes, tile_for, write_table

Size = tuple[int, int, int]
"""M, N, D."""
Call = Callable[[LossPath], InfoNCEResult]
"""One loss with its gradients, by the path asked for."""
Timer = Callable[[str, Tile, Size], float]
"""Milliseconds of a call with that tile in that entry's place; raises one of `REFUSALS`."""

ENTRIES = tuple(
    f"{kernel}-{bits}-{load}"
    for bits in (16, 32)
    for load in LOADS
    for kernel in ("lse", "gradient")
)
SIZES: tuple[Size, ...] = ((8192, 16384, 768), (8192, 16384, 2304))

_HALF_PLAIN = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (128, 128, 32, 8, 4),
    (64, 64, 64, 4, 3),
    (128, 64, 32, 4, 3),
    (64, 64, 32, 4, 2),
)
_HALF_MIDDLE = (
    (64, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (64, 64, 64, 8, 3),
    (64, 64, 64, 4, 3),
    (64, 128, 32, 8, 4),
    (64, 64, 32, 8, 3),
)
_HALF_HEAVY = (
    (64, 64, 32, 8, 3),
    (64, 64, 64, 8, 3),
    (64, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (32, 64, 64, 8, 3),
    (32, 64, 64, 4, 3),
    (32, 64, 32, 8, 2),
)
_FULL_PLAIN = (
    (64, 64, 32, 8, 2),
    (64, 64, 16, 8, 3),
    (128, 64, 16, 8, 3),
    (64, 128, 16, 8, 3),
    (128, 128, 16, 8, 3),
    (128, 128, 32, 8, 2),
    (64, 64, 32, 4, 3),
    (32, 64, 32, 4, 3),
)
_FULL_HEAVY = (
    (64, 64, 16, 8, 3),
    (64, 64, 32, 8, 2),
    (32, 64, 32, 4, 3),
    (64, 128, 16, 8, 3),
    (32, 32, 32, 4, 3),
)
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    load: tuple(
        Tile(block_r=r, block_c=c, block_d=d, num_warps=warps, num_stages=stages)
        for r, c, d, warps, stages in numbers
    )
    for load, numbers in {
        "16-plain": _HALF_PLAIN,
        "16-middle": _HALF_MIDDLE,
        "16-heavy": _HALF_HEAVY,
        "32-plain": _FULL_PLAIN,
        "32-middle": _FULL_HEAVY,
        "32-heavy": _FULL_HEAVY,
    }.items()
}
"""Tiles that are tried, by bits and load, the most promising first."""

BOUNDS = {16: 0.02, 32: 1e-5}
"""Largest difference of a gradient from the chunked path's, as a vector; 16-bit gradients are
products of 16-bit probabilities."""

_RAGGED = (257, 515)
"""M and N of the calls whose numbers are compared."""


class WrongNumbers(Exception):
    """A candidate changes the result."""


REFUSALS = (WrongNumbers, OutOfResources, PTXASError, CompilationError, RuntimeError)
"""Errors of candidates that are left out; a lowering that fails raises a plain RuntimeError."""

NOT_REFUSALS = (torch.AcceleratorError, torch.OutOfMemoryError)
"""RuntimeErrors after which the device is broken or full for the others too."""


@dataclass(frozen=True)
class Trial:
    """One candidate. `ms_by_size` is empty and `note` says why where it is left out."""

    entry: str
    tile: Tile
    ms_by_size: tuple[float, ...]
    tflops: tuple[float, ...]
    note: str = ""

    @property
    def score(self) -> float:
        """Geometric mean of the times, less is better."""
        return statistics.geometric_mean(self.ms_by_size) if self.ms_by_size else math.inf

    def __str__(self) -> str:
        tile = self.tile
        shape = f"{tile.block_r}x{tile.block_c}x{tile.block_d}"
        name = f"{self.entry}: {shape}, {tile.num_warps} warps, {tile.num_stages} stages"
        if self.note:
            return f"{name}: left out, {self.note}"
        pairs = zip(self.ms_by_size, self.tflops, strict=True)
        return f"{name}: " + ", ".join(f"{ms:.3f} ms ({speed:.1f} TFLOP/s)" for ms, speed in pairs)


def bits_of(entry: str) -> int:
    return int(entry.split("-")[1])


def present_tiles(capability: int, entries: Sequence[str] = ENTRIES) -> dict[str, Tile]:
    """The tiles that the table has now."""
    parts = {entry: entry.split("-") for entry in entries}
    return {
        entry: tile_for(capability, kernel, int(bits), load)
        for entry, (kernel, bits, load) in parts.items()
    }


def tune(
    present: Mapping[str, Tile],
    sizes: Sequence[Size],
    timer: Timer,
    *,
    room: int,
    seconds: float,
    say: Callable[[str], None] = print,
    keep: Callable[[Mapping[str, Tile], Sequence[Trial]], None] = lambda best, trials: None,
) -> tuple[dict[str, Tile], list[Trial]]:
    """The best tile of each entry of `present`, and all that was tried.

    Args:
        present: the tiles there are; the first candidates.
        room: bytes of shared memory that a program may have.
        seconds: about as long; entries have equal shares of it.
        keep: given the best tiles and the trials so far after each trial.

    Raises:
        RuntimeError: the device is broken or its memory full (one of `NOT_REFUSALS`).
    """
    end, best, trials = time.monotonic() + seconds, dict(present), list[Trial]()
    for place, (entry, tile) in enumerate(present.items()):
        left = end - time.monotonic()
        entry_end = time.monotonic() + left / (len(present) - place)
        tried: list[Trial] = []
        for candidate in dict.fromkeys((tile, *CANDIDATES[entry.partition("-")[2]])):
            if time.monotonic() >= entry_end:
                say(f"{entry}: no time for the other candidates")
                break
            tried.append(_try(entry, candidate, sizes, timer, room))
            trials.append(tried[-1])
            say(str(tried[-1]))
            winner = min(tried, key=lambda trial: trial.score)
            if winner.ms_by_size:
                best[entry] = winner.tile
            keep(best, trials)
        if tried and winner.ms_by_size:
            say(f"best: {winner}")
    return best, trials


def _try(entry: str, tile: Tile, sizes: Sequence[Size], timer: Timer, room: int) -> Trial:
    needed = tile.shared_bytes(bits_of(entry))
    if needed > room:
        note = f"takes {needed / 1024:.0f} KiB of shared memory, there are {room / 1024:.0f}"
        return Trial(entry, tile, (), (), note)
    try:
        times = tuple(timer(entry, tile, size) for size in sizes)
    except NOT_REFUSALS:
        raise
    except REFUSALS as error:
        lines = str(error).strip().splitlines() or [""]
        return Trial(entry, tile, (), (), f"{type(error).__name__}: {lines[0][:120]}")
    speeds = tuple(6e-9 * math.prod(size) / ms for size, ms in zip(sizes, times, strict=True))
    return Trial(entry, tile, times, speeds)


def options_for(entry: str, query_MD: Tensor, doc_ND: Tensor) -> LossOptions:
    """The options of a call in which that entry's kernel takes much of the time."""
    load = entry.rpartition("-")[2]
    false_negatives = None if load == "plain" else FalseNegatives(margin=-0.1)
    if load == "heavy":
        false_negatives = FalseNegatives(margin=-0.1, query_guide_MG=query_MD, doc_guide_NG=doc_ND)
    return LossOptions(
        temperature=0.05,
        # documents that choose take a second pass, which `gradient` is for
        softmaxes=SYMMETRIC if entry.startswith("gradient") else ONE_WAY,
        false_negatives=false_negatives,
        hardness=None if load == "plain" else Hardness(strength=3.0),
    )


class CallTimer:
    """A `Timer` by CUDA events: the median of several calls, after it looked at the numbers."""

    def __init__(self, device: torch.device, present: Mapping[str, Tile], repeats: int = 7) -> None:
        self.device, self.present, self.repeats = device, present, repeats
        self.capability = capability_of(device)
        self._inputs: dict[tuple[Size, torch.dtype], tuple[Tensor, ...]] = {}
        self._expected: dict[tuple[str, int], InfoNCEResult] = {}
        self._right: set[tuple[str, Tile, int]] = set()

    def __call__(self, entry: str, tile: Tile, size: Size) -> float:
        with installed({self.capability: {**self.present, entry: tile}}):
            self._check(entry, tile, size[2])
            call = self._call(entry, size)
            call(LossPath.TRITON)
            return statistics.median(
                elapsed_ms(lambda: call(LossPath.TRITON), self.device) for _ in range(self.repeats)
            )

    def _call(self, entry: str, size: Size) -> Call:
        half = torch.bfloat16 if self.capability >= 80 else torch.float16
        key = size, half if bits_of(entry) == 16 else torch.float32
        if key not in self._inputs:
            draw = torch.Generator(self.device).manual_seed(0)
            rows = (size[0], size[2]), (size[1], size[2])
            vectors = (torch.randn(shape, generator=draw, device=self.device) for shape in rows)
            self._inputs[key] = tuple(F.normalize(x, dim=1).to(key[1]) for x in vectors)
        query_MD, doc_ND = self._inputs[key]
        candidates = Candidates(target=torch.arange(size[0], device=self.device))
        options = options_for(entry, query_MD, doc_ND)

        def call(path: LossPath) -> InfoNCEResult:
            return value_and_gradients(query_MD, doc_ND, candidates, replace(options, path=path))

        return call

    def _check(self, entry: str, tile: Tile, width: int) -> None:
        """Raise WrongNumbers where a call of that width gives others than the chunked path."""
        if (entry, tile, width) in self._right:
            return
        call, bound = self._call(entry, (*_RAGGED, width)), BOUNDS[bits_of(entry)]
        if (entry, width) not in self._expected:
            self._expected[entry, width] = call(LossPath.CHUNKED)
        got, expected = call(LossPath.TRITON), self._expected[entry, width]
        limits = {"loss": 1e-5, "d_query_MD": bound, "d_doc_ND": bound}
        for name, limit in limits.items():
            value = getattr(expected, name)
            error = float((getattr(got, name) - value).norm() / value.norm())
            if not error <= limit:
                raise WrongNumbers(f"{name} is off by {error:.1e}")
        self._right.add((entry, tile, width))


@contextmanager
def installed(table: Mapping[int, Mapping[str, Tile]]) -> Iterator[None]:
    """Calls find their tiles in this table."""
    outer = os.environ.get("LOWMEM_CFT_TILES")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiles.json"
        write_table(path, table)
        os.environ["LOWMEM_CFT_TILES"] = str(path)
        try:
            yield
        finally:
            del os.environ["LOWMEM_CFT_TILES"]
            if outer is not None:
                os.environ["LOWMEM_CFT_TILES"] = outer


def elapsed_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds from an empty queue to the end of what the work queues."""
    torch.cuda.synchronize(device)
    make_event: Any = torch.cuda.Event
    start, end = (make_event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def parse_size(text: str) -> Size:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text}, wanted MxNxD such as 8192x16384x768")
    m, n, d = map(int, parts)
    if n < m:
        raise argparse.ArgumentTypeError(f"got {text}, wanted N >= M, a positive for each query")
    return m, n, d


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("tiles.json"), help="default: %(default)s")
    add("--sizes", nargs="+", type=parse_size, default=list(SIZES), help="MxNxD")
    add("--seconds", type=float, default=900.0, help="about as long (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    values = parse(argv)
    if not torch.cuda.is_available():
        print("tune: needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if (reason := why_not_triton(torch.empty(0, 0, device=device))) is not None:
        print(f"tune: the Triton path is not for this device: {reason}", file=sys.stderr)
        return 2
    present = present_tiles(capability_of(device))

    def write(best: Mapping[str, Tile], _: Sequence[Trial] = ()) -> None:
        write_table(values.out, {capability_of(device): best})

    timer, room = CallTimer(device, present), room_bytes(device)
    best, _ = tune(present, values.sizes, timer, room=room, seconds=values.seconds, keep=write)
    write(best)
    print(f"written: {values.out}; use it by LOWMEM_CFT_TILES={values.out.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
