"""Checks that are counted, and errors that are results."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.device import release
from bench.gpu.options import Options
from bench.harness import say


class Stopped(Exception):
    """A check did not hold, and nothing is to be checked after it."""


class Checks:
    """Values beside their bounds; `stop` raises `Stopped` at the first that does not hold."""

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
