"""What all measurements share: turns, fresh processes, facts of the machine, one line of JSON.

Importing it loads nothing heavy. That matters: on Linux a child process starts with its parent's
peak resident memory as its own, so whoever starts measured processes has to stay small itself.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.perf_counter()

LIBRARIES = (
    "lowmem-cft",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "sentence-transformers",
    "datasets",
    "numpy",
)


def say(text: str) -> None:
    """A line on standard error, after the seconds since this process began."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def digits(value: float) -> float:
    """The value to four significant digits."""
    return float(f"{value:.4g}")


def in_turn(sides: Sequence[T], round_index: int) -> list[T]:
    """The order of the sides in a round: each of them goes first in one round after another."""
    first = round_index % max(1, len(sides))
    return [*sides[first:], *sides[:first]]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module or class is another one while the block runs."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


# -- facts ----------------------------------------------------------------------------------------


def versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of those libraries that are installed."""
    from lowmem_cft.machine import library_versions

    return library_versions(names)


def machine(device: torch.device) -> dict[str, Any]:
    """Names of the device and the CPU, cores and threads."""
    import torch

    from lowmem_cft.machine import processor_name

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


# -- processes -----------------------------------------------------------------------------------


def run_fresh(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a module in a process of its own and give the JSON object it wrote.

    The file to write it to comes last, as `--result FILE`; what it prints goes to standard error.

    Raises:
        RuntimeError: it failed.
    """
    values = run_limited(["-m", module, *arguments])
    if "error" in values:
        raise RuntimeError(f"{module} {' '.join(arguments)}: {values['error']}")
    return values


def run_limited(command: Sequence[str], seconds: float | None = None) -> dict[str, Any]:
    """What Python, called so, had written by its end, and an `error` where it failed.

    It overwrites `--result FILE`, which comes last, as it goes, by `write_whole`. It is killed after
    `seconds`, with all processes that it started.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        process = subprocess.Popen(
            [sys.executable, *command, "--result", str(result)],
            stdout=sys.stderr,
            start_new_session=True,
        )
        error: dict[str, Any] = {}
        try:
            if code := process.wait(seconds):
                error = {"error": f"its process ended with {code}"}
        except subprocess.TimeoutExpired:
            error = {"error": f"killed after {seconds:.0f} s"}
        finally:  # also of a process that has ended: what it left behind
            end_group(process)
        written = result.read_text(encoding="utf-8") if result.is_file() else "{}"
        return {**error, **json.loads(written)}


def end_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a session, with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# -- results --------------------------------------------------------------------------------------


def print_line(values: Mapping[str, Any]) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(values), flush=True)


def write_whole(path: Path, values: Mapping[str, Any]) -> None:
    """Values as JSON, never half of them."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
