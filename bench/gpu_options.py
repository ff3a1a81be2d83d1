"""What the GPU check's parts are given, and the small things that all of them use."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_ballast import Ballast
from lowmem_cft.planning.live_bytes import LiveBytes
from measure import median, synchronize, write_whole

STARTED = time.perf_counter()

MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "MiniCPM-2B": ("cft-minicpm-2b", ()),
    "Gemma-2B": ("cft-gemma-2b", ()),
    "Phi-2": ("cft-phi-2", ()),
    "LLaMA-8B": ("prompteol-llama-7b", ("lora.rank=16",)),
}
"""Name -> recipe whose adapter and loss are used, and what is changed of it."""


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


@dataclass
class Options:
    """What a part may ask.

    `seconds`: the part's budget, from `started` on. `rows`: triplets of the memory proof's step,
    which should take `step_seconds` at most. `ballast`: beside which the part runs. `result`: where
    `note` writes what the part has so far, which is `noted`. `picture`: where one may be drawn.
    """

    device: torch.device
    tiny: bool
    cap_bytes: int
    seconds: float
    rows: int = 65536
    step_seconds: float | None = None
    models: tuple[str, ...] = ()
    result: Path | None = None
    picture: Path | None = None
    ballast: Ballast | None = None
    started: float = field(default_factory=time.perf_counter)
    noted: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.started)

    def note(self, found: Mapping[str, Any]) -> None:
        """Keep this beside what was noted before: all there is if the part does not end."""
        self.noted.update(found)
        if self.result is not None:
            write_whole(self.result, {**self.noted, "unfinished": True})


def release() -> None:
    """Give freed device memory back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def capped(options: Options, room_bytes: int) -> Iterator[None]:
    """The allocator limited to so many bytes on the GPU; elsewhere nothing happens."""
    if not options.cuda:
        yield
        return
    total = torch.cuda.get_device_properties(options.device).total_memory
    share = min(1.0, max(0, room_bytes) / total)
    torch.cuda.set_per_process_memory_fraction(share, options.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, options.device)


def context_bytes(options: Options) -> int:
    """Of the GPU's memory what is used beside this process's allocator; 0 on a CPU."""
    if not options.cuda:
        return 0
    free, total = torch.cuda.mem_get_info(options.device)
    return int(total - free - torch.cuda.memory_reserved(options.device))


@dataclass
class Peak:
    """Bytes: `before` and at most `allocated` while entered; `reserved` by the allocator.

    On a CPU, where tensors are counted: without `known` ones, `held` bytes being there before.
    `emptied`: the allocator gives back first what it keeps, as `reserved` needs and times do not.
    """

    options: Options
    known: Sequence[Tensor] = ()
    held: int = 0
    emptied: bool = True
    before: int = 0
    allocated: int = 0
    reserved: int = 0

    def __enter__(self) -> Peak:
        device = self.options.device
        if self.emptied:
            release()
        if self.options.cuda:
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return self
        self.before = self.held
        self._live = LiveBytes(self.known)
        self._live.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        device = self.options.device
        if self.options.cuda:
            synchronize(device)
            self.allocated = torch.cuda.max_memory_allocated(device)
            self.reserved = torch.cuda.max_memory_reserved(device)
            return
        self._live.__exit__(*error)  # type: ignore[no-untyped-call]
        self.allocated = self.reserved = self.before + self._live.peak


def seconds_of(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median of so many runs after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return median(found[1:])


def matrix_peak(options: Options) -> float:
    """FLOP/s of a large bf16 product."""
    size = 8192 if options.cuda and not options.tiny else 512
    a, b = (torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 10, options.device)


class Stopped(Exception):
    """A check did not hold, and nothing is to be checked after it."""


class Checks:
    """What was found beside what was wanted; `stop` raises `Stopped` at the first failure."""

    def __init__(self, options: Options, *, stop: bool = False) -> None:
        self.options, self.stop = options, stop
        self.count = 0
        self.failed: list[dict[str, Any]] = []
        self.worst: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float | str] = {}

    def at_most(self, kind: str, name: str, value: float, bound: float) -> None:
        self.count += 1
        entry = {"name": name, "value": float(f"{value:.3e}"), "bound": bound}
        if kind not in self.worst or value > self.worst[kind]["value"]:
            self.worst[kind] = entry
        if not value <= bound:  # a value that is no number fails too
            say(f"  FAILED {kind}, {name}: {value:.3e}, wanted at most {bound:.0e}")
            self._failed({"kind": kind, **entry})

    def holds(self, kind: str, name: str, value: bool) -> None:
        self.at_most(kind, name, 0.0 if value else 1.0, 0.0)

    def fails(self, kind: str, error: Exception, **more: str) -> None:
        """An exception in the place of a finding."""
        self.count += 1
        say(f"  FAILED {kind} {' '.join(more.values())}: {message_of(error)}")
        self._failed({"kind": kind, **more, "error": message_of(error)})

    def skips(self, what: str, reason: str) -> None:
        """Something that cannot be checked on this machine, which is no failure."""
        self.skipped[what] = reason
        say(f"  not checked, {what}: {reason}")

    def _failed(self, entry: dict[str, Any]) -> None:
        self.failed.append(entry)
        if self.stop:
            raise Stopped(entry["kind"])

    def group(self, name: str, work: Callable[[Options, Checks], None]) -> None:
        """Run a group of checks; an exception in it is a failed check."""
        if self.options.left < 5:
            self.seconds[name] = "skipped"
            self._failed({"kind": name, "error": "no time left"})
            return
        start = time.perf_counter()
        try:
            work(self.options, self)
        except Stopped:
            raise
        except Exception as error:
            self.fails(name, error)
        release()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        say(f"  {name}: {self.seconds[name]} s")
        self.options.note(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.failed and self.count > 0,
            "num_checks": self.count,
            "failed": self.failed,
            "worst": self.worst,
            "groups": self.seconds,
            "skipped": self.skipped,
        }


def message_of(error: BaseException) -> str:
    """What went wrong and where, in short."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:600]} ({where})"


_LONG = ("steps", "lora", "chunk_profile")
"""Keys of results that no line on the screen can show."""

_LINE = 800


def guarded(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or that it failed."""
    try:
        result = work()
    except Exception as error:
        result = {"ok": False, "error": message_of(error)}
    brief = {key: value for key, value in result.items() if key not in _LONG}
    say(f"  {name}: {str(brief)[:_LINE]}")
    for step in result.get("steps", ()):
        keys = ("rows", "seconds", "share", "tokens_per_s", "tflops", "ratio", "moment", "ran_out")
        say(f"    { ({key: step[key] for key in keys}) }")
    return result
