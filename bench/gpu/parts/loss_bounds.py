"""Reads and writes of the loss out of bounds: by poison, and under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from typing import Any

from bench.gpu.options import Options
from bench.harness import end_group, say

SANITIZERS: dict[str, list[str]] = {
    # calls that torch itself tries and that fail are none of the kernels' errors
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
}
CHILD = ["-m", "bench.gpu.sanitized"]

_REFUSED = "Device not supported"
"""What compute-sanitizer says where it has no support for the device or its driver."""

_LAST_WORDS = 3000


def find_sanitizer() -> str | None:
    """On the path or where CUDA's own installer puts it."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )


def check(options: Options) -> dict[str, Any]:
    """Small ragged losses, alone and under compute-sanitizer where there is one."""
    tool = find_sanitizer()
    commands = {"alone": [sys.executable, *CHILD]}
    if tool is None:
        say("  compute-sanitizer is not installed: surroundings are looked at, races are not")
    else:
        for name, more in SANITIZERS.items():
            checks = [tool, "--tool", name, "--error-exitcode", "9", *more]
            commands[name] = [*checks, *commands["alone"]]
    # allocations of their own: the caching allocator hides what is beyond a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    results: dict[str, Any] = {"ok": True, "compute_sanitizer": tool}
    for place, (name, command) in enumerate(commands.items()):
        seconds = max(5.0, options.left / (len(commands) - place))
        results[name] = run_child(command, environment, seconds)
        results["ok"] = results["ok"] and results[name]["ok"]
        options.note(results)
    return results


def run_child(command: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the tool's own child is to end with it
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end_group(process)
        output, _ = process.communicate()
        error = f"killed after {seconds:.0f} s"
        return {"ok": False, "error": error, "output": output[-_LAST_WORDS:]}
    code = process.returncode
    say(f"  {' '.join(command)}: {code}")
    if _REFUSED in output:
        line = next(line for line in output.splitlines() if _REFUSED in line)
        return {"ok": True, "skipped": line}
    result = {"ok": code == 0, "seconds": round(time.perf_counter() - start, 1)}
    return result | ({} if code == 0 else {"code": code, "output": output[-_LAST_WORDS:]})
