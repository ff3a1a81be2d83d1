"""The GPU check's parts that time the loss: bounds and races, rivals, tiles."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import loss
from gpu_options import Options, say
from loss_report import Row, plot, print_table
from loss_sides import make_sides
from lowmem_cft_kernels import tune
from lowmem_cft_kernels.tiles import Tile, capability_of, room_bytes

SANITIZERS: dict[str, list[str]] = {
    # calls that torch itself tries and that fail are none of the kernels' errors
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
}
CHILD = Path(__file__).with_name("gpu_sanitized.py")
TINY_SIZE = (24, 48, 32)
TUNED = tuple(entry for entry in tune.ENTRIES if tune.bits_of(entry) == 16)
"""The entries for 16 bits."""

_REFUSED = "Device not supported"
"""What compute-sanitizer says where it has no support for the device or its driver."""

_LAST_WORDS = 3000
_COMPARISON_SECONDS = 30.0
"""Kept for one size: nothing is begun with less."""


def find_sanitizer() -> str | None:
    """On the path or where CUDA's own installer puts it."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )


def check_sanitizer(options: Options) -> dict[str, Any]:
    """Small ragged losses, alone and under compute-sanitizer where there is one."""
    tool = find_sanitizer()
    commands = {"alone": [sys.executable, str(CHILD)]}
    if tool is None:
        say("  compute-sanitizer is not installed: surroundings are looked at, races are not")
    else:
        for name, more in SANITIZERS.items():
            checks = [tool, "--tool", name, "--error-exitcode", "9", *more]
            commands[name] = [*checks, *commands["alone"]]
    # allocations of their own: the caching allocator hides what is beyond a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found: dict[str, Any] = {"ok": True, "compute_sanitizer": tool}
    for place, (name, command) in enumerate(commands.items()):
        seconds = max(5.0, options.left / (len(commands) - place))
        found[name] = _run_child(command, environment, seconds)
        found["ok"] = found["ok"] and found[name]["ok"]
        options.note(found)
    return found


def _run_child(command: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
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
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        error = f"killed after {seconds:.0f} s"
        return {"ok": False, "error": error, "output": output[-_LAST_WORDS:]}
    code = process.returncode
    say(f"  {' '.join(command)}: {code}")
    if _REFUSED in output:
        line = next(line for line in output.splitlines() if _REFUSED in line)
        return {"ok": True, "skipped": line}
    found = {"ok": code == 0, "seconds": round(time.perf_counter() - start, 1)}
    return found | ({} if code == 0 else {"code": code, "output": output[-_LAST_WORDS:]})


def check_loss_speed(options: Options) -> dict[str, Any]:
    """bench/loss.py's comparison, size by size while there is time, with its picture."""
    kind = options.device.type
    sizes = [TINY_SIZE] if options.tiny else loss.SIZES[kind]
    sides = make_sides()
    if options.tiny:
        sides = [side for side in sides if side.name in ("ours", "eager")]
    found: dict[str, Any] = {}
    rows: list[Row] = []
    for size in sizes:
        if rows and options.left < _COMPARISON_SECONDS:
            say(f"  no time left from {size} on")
            break
        found = loss.run(
            options.device,
            [size],
            sides=sides,
            rounds=3 if options.tiny else 9,
            budget_s=0.5 if options.tiny else 5.0,
            seconds=max(1.0, options.left - _COMPARISON_SECONDS / 2),
            limit_bytes=options.cap_bytes,
        )
        rows += found["rows"]
        options.note({**found, "rows": rows})
        if "stopped" in found:
            break
    found |= loss.headline(rows, kind)
    ours = [row for row in rows if row["impl"].startswith("ours")]
    right = any(row["status"] == "ok" for row in ours) and not any(map(loss.is_bad, ours))
    found |= {"ok": right, "rows": rows}
    print_table(found)
    if options.picture is not None and importlib.util.find_spec("matplotlib") is not None:
        plot(found, options.picture)
        say(f"  picture: {options.picture}")
    return found


def check_tiles(options: Options) -> dict[str, Any]:
    """The best tiles found in the time beside those that are shipped; nothing is written."""
    if not options.cuda:
        return {"ok": True, "skipped": "tiles are timed on CUDA"}
    present = tune.present_tiles(capability_of(options.device), TUNED)
    best, trials = tune.tune(
        present,
        tune.SIZES,
        tune.CallTimer(options.device, present),
        room=room_bytes(options.device),
        seconds=max(1.0, options.left - 5),
        say=lambda line: say(f"  {line}"),
        keep=lambda best, trials: options.note(_tiles_found(present, best, trials)),
    )
    return _tiles_found(present, best, trials)


def _tiles_found(
    present: Mapping[str, Tile], best: Mapping[str, Tile], trials: Sequence[tune.Trial]
) -> dict[str, Any]:
    timed = [trial for trial in trials if trial.ms_by_size]
    return {
        "ok": bool(timed),
        "sizes": tune.SIZES,
        "entries": {
            entry: {
                "shipped": asdict(tile),
                "best": asdict(best[entry]),
                "faster_by": _gain([t for t in timed if t.entry == entry], tile),
            }
            for entry, tile in present.items()
        },
        "trials": [{**asdict(trial), "score": trial.score} for trial in timed],
        "left_out": [str(trial) for trial in trials if not trial.ms_by_size],
    }


def _gain(timed: list[tune.Trial], shipped: Tile) -> float | None:
    """The shipped tile's time by the best one's; None where it has none."""
    scores = {trial.tile: trial.score for trial in timed}
    return round(scores[shipped] / min(scores.values()), 4) if shipped in scores else None
