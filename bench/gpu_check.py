"""All that a CUDA GPU is needed for, in three calls of under 10 minutes. Nothing is downloaded.

    python bench/gpu_check.py --out auto          # all of it, also to bench/results/
    python bench/gpu_check.py --only device --only correctness --only loss_correctness --only loss_bounds
    python bench/gpu_check.py --only memory --only loss_memory --only dropout_speed
    python bench/gpu_check.py --only loss_speed --only loss_tiles
    python bench/gpu_check.py --only memory --cap-gib 8
    python bench/gpu_check.py --tiny              # every branch the machine can run, in minutes

Needed: torch with triton and numpy; loss_speed: rich, and matplotlib for its picture; correctness and
memory: transformers, peft, accelerate, pyyaml, psutil and pydantic. Where pydantic is not installed,
carry its wheel and those of pydantic-core (for that Python and platform, in the version that this
pydantic names), annotated-types and typing-inspection, or the four unpacked in a folder that is on
PYTHONPATH. What is missing fails those parts alone. Without bitsandbytes memory takes 16-bit weights,
and a model that does not fit so is skipped.

Each part has a process and a time budget of its own, so that none takes the others with it; what a
part has found is written to `--out` when it ends, whole or not. Progress goes to standard error. The
last line of standard output is one line of JSON:

ok, seconds, parts, machine, versions, options.  parts: name -> ok, seconds, error if it failed, and

device        matrix_tflops: bf16 on a large product. copy_gbps: read and written. total_bytes.
correctness   num_checks; failed: the checks that did not hold, each with value and bound; worst: the
              greatest value of each kind of check with its bound; groups: seconds of each group.
              Gradients of every plan are held against one plain full-batch backward on the same
              device (peft's own layers): float64 to 1e-10, float32 to 1e-5, bf16 by the error of
              plain PyTorch under autocast against float64, at most 1.5 times.
memory        models: name -> weights (measured bytes beside the planner's), build_peak_bytes,
              max_logical_batch (by the planner), steps. Each of steps: rows, plan, moment, seconds,
              tokens_per_s (real tokens), tflops (the planner's operations over the time),
              share_of_matrix_peak, predicted_bytes (all, context included), allocated_bytes and
              reserved_bytes (most of the process's tensors and of its allocator), ran_out (memory
              ran out and the step went on with plan_after), within_cap (reserved_bytes and the context
              before the first model). ratio: predicted without context and slack by allocated;
              ratio_reserved: predicted without context by reserved; ratio_step: what the step adds
              to weights and optimizer, by the same without. loss_phase: the loss on that many
              random embeddings. context_bytes: on the device and not in the allocator; the part's
              own is from before the first model. On a CPU live tensors are counted, and the cap is
              the planner's.
dropout_speed rows as of bench/dropout.py
loss_correctness  as correctness: sets of options against the formula in float64, at ragged sizes, by
              the Triton path and the chunked one; float32 to 1e-5, value and observations in every
              dtype; gradients of 16 bits to twice the error of plain autograd in the dtype; twice
              the same bits.
loss_bounds   alone: poison around inputs and gradients. memcheck, racecheck: the same under
              compute-sanitizer, where that is installed and takes the device.
loss_memory   cases, each with extra_bytes (peak beyond inputs and gradients, 64 MiB at most),
              reserved_bytes, seconds, tflops, max_rel_error as in bench/loss.py; the largest has
              65,536 x 131,072 similarities of size 2304.
loss_speed    as of bench/loss.py, with its picture beside `--out`
loss_tiles    entries: of the tile table, shipped and best tile, and the ratio of their times.

Weights are random: memory and time do not depend on them. 4-bit ones are quantised matrix by matrix,
so that the 16-bit model never exists. Lengths are as of NLI sentences: mean 14, up to 40, some 150.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from measure import machine, print_line, run_limited, versions, write_whole

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where nothing is installed
sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from gpu_options import MODELS, STARTED, Options, message_of, say

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("lowmem-cft", "torch", "triton", "transformers", "peft", "bitsandbytes", "numpy")

_GRACE = 45.0
"""Seconds after its time is over in which a part may end by itself."""

_START = 15.0
"""Seconds that starting a part's process takes, at most."""


@dataclass(frozen=True)
class Part:
    """One part: gives what it found, with `ok`. `seconds`: its budget at most."""

    run: Callable[[Options], dict[str, Any]]
    seconds: float


def _part(module: str, name: str, seconds: float) -> Part:
    """Imported when it runs: what one part lacks does not stop the others."""

    def run(options: Options) -> dict[str, Any]:
        found: dict[str, Any] = getattr(importlib.import_module(module), name)(options)
        return found

    return Part(run, seconds)


PARTS: dict[str, Part] = {
    "device": _part("gpu_parts_device", "check_device", 40),
    "correctness": _part("gpu_parts_correctness", "check_correctness", 120),
    "loss_correctness": _part("gpu_parts_loss", "check_loss_correctness", 200),
    "loss_bounds": _part("gpu_parts_loss_speed", "check_sanitizer", 100),
    "memory": _part("gpu_parts_memory", "check_memory", 290),
    "loss_memory": _part("gpu_parts_loss", "check_loss_memory", 80),
    "dropout_speed": _part("gpu_parts_device", "check_dropout_speed", 35),
    "loss_speed": _part("gpu_parts_loss_speed", "check_loss_speed", 330),
    "loss_tiles": _part("gpu_parts_loss_speed", "check_tiles", 150),
}
"""In the order they run."""


def choose_options(values: argparse.Namespace, seconds: float) -> Options:
    cuda = values.device == "cuda" or (values.device is None and torch.cuda.is_available())
    # by its number: some of torch.cuda's functions take no device without one
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Options(
        device=device,
        tiny=values.tiny,
        cap_bytes=int(values.cap_gib * 2**30),
        seconds=seconds,
        step_seconds=2.0 if values.tiny else 25.0,
        models=tuple(values.models or MODELS),
        result=values.result,
        picture=picture_path(values, device) if values.out else None,
    )


def run_here(name: str, values: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A part in this process; an exception is its result, beside what it had noted."""
    start = time.perf_counter()
    found: dict[str, Any] = {}
    options: Options | None = None
    try:
        options = choose_options(values, seconds)
        found["machine"] = machine(options.device)
        found |= {"ok": True, **PARTS[name].run(options)}
    except Exception as error:
        traceback.print_exc()
        reason = message_of(error)
        if isinstance(error, ModuleNotFoundError):
            reason += f"; install it, or carry it along as the text of {Path(__file__).name} says"
        found |= {**(options.noted if options else {}), "ok": False, "error": reason}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def run_apart(name: str, values: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A part in a process of its own, ended somewhat after its time is over."""
    arguments = [
        "--here",
        "--only",
        name,
        "--cap-gib",
        str(values.cap_gib),
        "--seconds",
        f"{seconds:.0f}",
    ]
    arguments += ["--tiny"] if values.tiny else []
    arguments += ["--device", values.device] if values.device else []
    arguments += ["--models", *values.models] if values.models else []
    arguments += ["--out", values.out] if values.out else []
    start = time.perf_counter()
    limit = seconds + _GRACE
    if not values.tiny:  # even a part in work is ended when all the time is over
        limit = min(limit, budget(values) + _GRACE - (start - STARTED))
    found = run_limited(Path(__file__), arguments, max(5.0, limit))
    taken = round(time.perf_counter() - start, 1)
    found = {"ok": False, **found, "seconds": taken}
    if found.pop("unfinished", False):
        found["ok"] = False
    if "error" in found:
        found["ok"] = False
    return found


def run_parts(values: argparse.Namespace) -> dict[str, Any]:
    """Every chosen part in turn; what there is so far is written after each."""
    names = chosen(values)
    shown = ("tiny", "cap_gib", "device", "only", "models")
    found: dict[str, Any] = {
        "ok": False,
        "seconds": 0.0,
        "parts": {},
        "machine": {},
        "versions": versions(LIBRARIES),
        "options": {key: getattr(values, key) for key in shown} | {"seconds": budget(values)},
    }
    for place, name in enumerate(names):
        later = sum(PARTS[other].seconds for other in names[place + 1 :])
        left = budget(values) - (time.perf_counter() - STARTED)
        seconds = min(PARTS[name].seconds, max(left - later, left / 2))
        if seconds < 5:
            found["parts"][name] = {"ok": False, "error": "not begun: no time left"}
            continue
        say(f"{name}: up to {seconds:.0f} s")
        part = (run_here if values.here else run_apart)(name, values, seconds)
        found["machine"] = part.pop("machine", found["machine"])
        found["parts"][name] = part
        say(
            f"{name}: {'ok' if part['ok'] else 'FAILED'}, {part['seconds']} s {part.get('error', '')}"
        )
        found["seconds"] = round(time.perf_counter() - STARTED, 1)
        found["ok"] = all(part["ok"] for part in found["parts"].values()) and len(
            found["parts"]
        ) == len(names)
        if values.out:
            device = str(found["machine"].get("device", "unknown"))
            write_whole(out_path(values, device), found)
    return found


def chosen(values: argparse.Namespace) -> list[str]:
    """The parts to run, in order."""
    return [name for name in PARTS if not values.only or name in values.only]


def budget(values: argparse.Namespace) -> float:
    """Seconds after which nothing new begins."""
    if values.seconds is not None:
        return float(values.seconds)
    return sum(PARTS[name].seconds + _START for name in chosen(values))


def out_path(values: argparse.Namespace, device: str) -> Path:
    """`--out`'s file; auto: named after the device, the day and what was chosen."""
    if values.out != "auto":
        return Path(values.out)
    device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    parts = "".join(f"_{name}" for name in chosen(values) if values.only)
    return folder / f"gpu_check_{device}_{date.today().isoformat()}{parts}.json"


def picture_path(values: argparse.Namespace, device: torch.device) -> Path:
    """Beside `--out`'s file."""
    return out_path(values, machine(device)["device"]).with_suffix(".png")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument("--only", action="append", choices=tuple(PARTS), help="may be repeated")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="for memory; all")
    parser.add_argument("--cap-gib", type=float, default=12.0, help="that the process may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="CUDA where there is one")
    parser.add_argument(
        "--seconds", type=float, help="after them nothing new begins; the parts' own"
    )
    parser.add_argument("--out", help="file for the results, or auto")
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    values = parse_arguments(argv)
    if values.result is not None:  # one part, for `run_apart`
        (name,) = values.only
        part = run_here(name, values, budget(values))
        write_whole(values.result, part)
        return 0
    found = run_parts(values)
    print_line(found)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
