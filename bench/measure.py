"""What benchmarks share: facts of the machine, peak memory, a fresh process per measurement.

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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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


def versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of the libraries that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.is_file():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """Names of the device and the CPU, cores and threads."""
    import torch

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; a clock read before that lies."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Count peak memory anew from here, where the system can (CUDA; CPU on Linux)."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")  # 5: the high-water mark (man 5 proc)


def run_fresh(script: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `script` in a process of its own and give the JSON object it wrote.

    The file to write it to comes last, as `--result FILE`; what it prints goes to standard error.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(script), *arguments, "--result", str(result)]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        if done.returncode:
            raise RuntimeError(f"{script.name} {' '.join(arguments)} failed: {done.returncode}")
        values: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return values


def print_line(values: Mapping[str, Any]) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(values), flush=True)


def run_limited(script: Path, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """`run_fresh` for a script that may fail: what it had written by its end, and an `error`.

    The script overwrites `--result FILE` as it goes, by `write_whole`. It is killed after `seconds`,
    with all processes that it started.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(script), *arguments, "--result", str(result)]
        error = None
        process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
        try:
            code = process.wait(seconds)
            if code:
                error = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            error = f"killed after {seconds:.0f} s"
        finally:  # also of a script that has ended: what it left behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        values: dict[str, Any] = {}
        if result.is_file():
            values = json.loads(result.read_text(encoding="utf-8"))
        return values if error is None else {"error": error, **values}


def write_whole(path: Path, values: Mapping[str, Any]) -> None:
    """Values as JSON, never half of them."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
