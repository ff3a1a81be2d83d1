"""All that a CUDA GPU is needed for, the most telling first, in one call. Nothing is downloaded.

    python bench/gpu_check.py --out auto --total-seconds 570       # what fits ten minutes
    python bench/gpu_check.py --out auto                           # all of it
    python bench/gpu_check.py --only memory --seconds 400 --models LLaMA-8B
    python bench/gpu_check.py --only memory --rows 16384 --leave-gib 7.7
    python bench/gpu_check.py --tiny                               # all of it on any machine

bench/README.md says which packages a GPU machine without a network needs, and how they
are carried there; what one part lacks fails that part alone.

Parts run in the order below, each in a process and a time budget of its own; a part that ends early
leaves its time to the next ones. With `--total-seconds` everything, starts included, ends by then,
and what did not fit is listed in `left_out`. `--seconds` gives parts other budgets than their own.
`smoke` decides whether it is worth going on: where it fails, nothing else runs. What a part has
found is written to `--out` when it ends, whole or not. Progress goes to standard error. The last
line of standard output is one line of JSON:

ok, stopped (by what, or null), left_out, seconds, parts, machine, versions, options, command.  ok is
about the parts that ran.  parts: name -> ok, seconds, error if it failed, and

smoke         num_checks, failed, worst, groups as below; nf4: null, or why there is none;
              attention: for each shape the backends that ran, bytes that the backward allocated
              beside its results, and the planner's formula for them; matrix_tflops: bf16 on a large
              product; copy_gbps: read and written.
loss_correctness  num_checks; failed: the checks that did not hold, each with value and bound; worst:
              the greatest value of each kind of check with its bound; groups: seconds of each.
              Sets of options against the formula in float64, at ragged sizes, by the Triton path and
              the chunked one; float32 to 1e-5, value and observations in every dtype; gradients of
              16 bits to twice the error of plain autograd in the dtype, those of float32 on tensor
              cores (split-bf16) to twice that of bf16; twice the same bits.
correctness   the same keys. Gradients of every plan are held against one plain full-batch backward
              on the same device (peft's own layers): float64 to 1e-10, float32 to 1e-5, bf16 by the
              error of plain PyTorch under autocast against float64, at most 1.5 times. skipped: what
              could not be checked, and why.
memory        a step of `--rows` triplets beside a ballast, a process that leaves `--leave-gib` of the
              card free: libraries, context and workspaces see a small card, too. ballast: held_bytes,
              free_bytes. models: name -> weights (measured bytes beside the planner's),
              build_peak_bytes, max_logical_batch (by the planner), attention_backends,
              chunk_profile (the dearest kernels of one chunk of 2,048 tokens, forward and backward:
              name, calls, microseconds, share), steps. Each of steps: rows, plan, moment, seconds,
              seconds_by_phase, tokens_per_s (real tokens), tflops (the planner's operations over the
              time), share_of_matrix_peak, predicted_bytes (all, context included), allocated_bytes
              and reserved_bytes (most of the process's tensors and of its allocator), card_bytes
              (most in use on the card, ballast not counted), num_alloc_retries, num_ooms, ran_out.
              sampled: the whole step would have taken too long, so that of its texts only `share`
              went through the model, in chunks as large as the whole step's, the longest among
              them; the loss was of all rows, and seconds_whole is by arithmetic. A small step is
              computed twice: bytes are of the first, from an empty allocator, seconds of the second.
              ratio: predicted
              without context and slack by allocated; ratio_reserved: predicted without context by
              reserved; ratio_step: what the step adds to weights and optimizer, by the same without.
              loss_phase: the loss on that many random embeddings. On a CPU live tensors are counted.
loss_speed    as of bench.loss, with its picture beside `--out`
loss_memory   cases, each with extra_bytes (peak beyond inputs and gradients, 64 MiB at most),
              reserved_bytes, seconds, tflops, max_rel_error as in bench.loss; the largest has
              65,536 x 131,072 similarities of size 2304.
loss_rates    calls: by dtype, workspace and mode, the microseconds and TFLOP/s of the loss's own kernels and of
              the library's products, apart, and the dearest kernels. products: TFLOP/s of addmm at two
              sizes of rectangles. tiles: milliseconds of a call by tile and registers.
dropout_speed rows as of bench.dropout
loss_bounds   alone: poison around inputs and gradients. memcheck, racecheck: the same under
              compute-sanitizer, where that is installed and takes the device.
loss_tiles    entries: of the tile table, shipped and best tile, and the ratio of their times.
train         as of bench.train, at a logical batch of 4,096.

Weights are random, but of `train`: memory and time do not depend on them. 4-bit ones are quantised
matrix by matrix, so that the 16-bit model never exists. Lengths are as of NLI sentences: mean 14, up
to 40, some 150.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.gpu.ballast import Ballast, ballast
from bench.gpu.checks import message_of
from bench.gpu.facts import card_facts, software
from bench.gpu.options import MODELS, Options
from bench.harness import (
    ROOT,
    STARTED,
    machine,
    print_line,
    run_limited,
    say,
    write_whole,
)
from lowmem_cft.machine import grow_cuda_blocks

SCRIPT = ROOT / "bench" / "gpu_check.py"
"""Runs this module."""

_GRACE = 45.0
"""Seconds after its time is over in which a part may end by itself."""

_START = 12.0
"""Seconds that starting a part's process takes, at most."""

_TINY_TIMES = 4.0
"""A CPU may take so many times as long for its small sizes as a GPU for its own."""

_CLOSING = 3.0
"""Seconds of the total that are kept for ending a part and writing what there is."""


@dataclass(frozen=True)
class Part:
    """One part: gives what it found, with `ok`.

    `seconds`: its budget. `least`: with less it is not begun. `ballast`: it runs beside one.
    """

    run: Callable[[Options], dict[str, Any]]
    seconds: float
    least: float = 10.0
    ballast: bool = False


def _part(name: str, seconds: float, **more: Any) -> Part:
    """The part's module is imported when it runs: what one part lacks does not stop the others."""

    def run(options: Options) -> dict[str, Any]:
        module = importlib.import_module(f"bench.gpu.parts.{name}")
        result: dict[str, Any] = module.check(options)
        return result

    return Part(run, seconds, **more)


PARTS: dict[str, Part] = {
    "smoke": _part("smoke", 75),
    "loss_correctness": _part("loss_correctness", 125, least=30),
    "correctness": _part("correctness", 90, least=30),
    "memory": _part("memory", 240, least=60, ballast=True),
    "loss_speed": _part("loss_speed", 120, least=30),
    "loss_memory": _part("loss_memory", 50, least=15),
    "loss_rates": _part("loss_rates", 60, least=15),
    "dropout_speed": _part("dropout_speed", 20),
    "loss_bounds": _part("loss_bounds", 100, least=15),
    "loss_tiles": _part("loss_tiles", 150, least=30),
    "train": _part("train", 240, least=60),
}
"""In the order they run: what is worth most first."""


# -- time ------------------------------------------------------------------------------------------


def budgets(values: argparse.Namespace) -> dict[str, float]:
    """Seconds of each chosen part, by name and in order."""
    given: dict[str | None, float] = dict(values.seconds or ())
    slower = _TINY_TIMES if values.tiny else 1.0
    return {
        name: given.get(name, given.get(None, slower * PARTS[name].seconds))
        for name in PARTS
        if not values.only or name in values.only
    }


def total_seconds(values: argparse.Namespace) -> float:
    """Seconds after which everything has ended."""
    if values.total_seconds is not None:
        return float(values.total_seconds)
    own = budgets(values)
    return sum(own.values()) + len(own) * (_START + _GRACE)


def allotted(budget: float, left: float, least: float) -> float:
    """Seconds for a part whose start is still to come; 0 where it is not worth beginning."""
    seconds = min(budget, left - _START - _CLOSING)
    return seconds if seconds >= min(least, budget) else 0.0


def parse_seconds(text: str) -> tuple[str | None, float]:
    """memory=400, or 400 for every chosen part."""
    name, equals, number = text.rpartition("=")
    if equals and name not in PARTS:
        raise argparse.ArgumentTypeError(f"got {name}, wanted one of {', '.join(PARTS)}")
    try:
        seconds = float(number)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"got {text}, wanted seconds as in memory=400, or 400")
    return (name if equals else None), seconds


# -- one part --------------------------------------------------------------------------------------


def wants_cuda(values: argparse.Namespace) -> bool:
    return values.device == "cuda" or (values.device is None and torch.cuda.is_available())


def beside_ballast(values: argparse.Namespace, name: str) -> AbstractContextManager[Ballast | None]:
    """The ballast, if the part runs beside one; before anything else touches the GPU."""
    if not PARTS[name].ballast:
        return nullcontext()
    return ballast(cuda=wants_cuda(values), leave_bytes=int(values.leave_gib * 2**30))


def choose_options(values: argparse.Namespace, seconds: float) -> Options:
    cuda = wants_cuda(values)
    # by its number: some of torch.cuda's functions take no device without one
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    grow_cuda_blocks(device)  # as the trainer does
    return Options(
        device=device,
        tiny=values.tiny,
        cap_bytes=int(values.cap_gib * 2**30),
        seconds=seconds,
        step_seconds=2.0 if values.tiny else values.step_seconds,
        rows=values.rows,
        models=tuple(values.models or MODELS),
        result=values.result,
        picture=picture_path(values, device) if values.out else None,
    )


def run_here(name: str, values: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A part in this process; an exception is its result, beside what it had noted."""
    start = time.perf_counter()
    result: dict[str, Any] = {}
    options: Options | None = None
    try:
        with beside_ballast(values, name) as held:
            options = choose_options(values, seconds)
            options.ballast = held
            result["machine"] = machine(options.device) | card_facts(options.device)
            result |= {"ok": True, **PARTS[name].run(options)}
    except Exception as error:
        traceback.print_exc()
        reason = message_of(error)
        if isinstance(error, ModuleNotFoundError):
            reason += "; install it, or carry it along as bench/README.md says"
        result |= {**(options.noted if options else {}), "ok": False, "error": reason}
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def run_apart(name: str, values: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A part in a process of its own, ended somewhat after its time is over."""
    start = time.perf_counter()
    left = total_seconds(values) - _CLOSING - (start - STARTED)
    limit = min(_START + seconds + _GRACE, left)
    command = [str(SCRIPT), *part_arguments(name, values, seconds)]
    result = run_limited(command, max(5.0, limit))
    result = {"ok": False, **result, "seconds": round(time.perf_counter() - start, 1)}
    if result.pop("unfinished", False) or "error" in result:
        result["ok"] = False
    return result


def part_arguments(name: str, values: argparse.Namespace, seconds: float) -> list[str]:
    """The options of this command for one part in a process of its own."""
    arguments = ["--here", "--only", name, "--seconds", f"{seconds:.1f}"]
    for key in ("cap_gib", "leave_gib", "rows", "step_seconds", "device", "out"):
        value = getattr(values, key)
        if value is not None:
            arguments += [f"--{key.replace('_', '-')}", str(value)]
    arguments += ["--tiny"] if values.tiny else []
    return arguments + (["--models", *values.models] if values.models else [])


# -- all parts -------------------------------------------------------------------------------------


def run_parts(values: argparse.Namespace) -> dict[str, Any]:
    """Every chosen part in turn; what there is so far is written after each."""
    own, parts = budgets(values), dict[str, dict[str, Any]]()
    results: dict[str, Any] = {
        "ok": False,
        "stopped": None,
        "left_out": list(own),
        "seconds": 0.0,
        "parts": parts,
        "machine": {},
        "versions": software(),
        "options": {key: value for key, value in vars(values).items() if key != "result"},
        "command": shlex.join(["bench/gpu_check.py", *sys.argv[1:]]),
    }
    for name, budget in own.items():
        left = total_seconds(values) - (time.perf_counter() - STARTED)
        seconds = allotted(budget, left, 1.0 if values.tiny else PARTS[name].least)
        if not seconds:
            say(f"{name}: not begun, {max(0.0, left):.0f} s are left")
            continue
        say(f"{name}: up to {seconds:.0f} s")
        part = (run_here if values.here else run_apart)(name, values, seconds)
        results["machine"] = part.pop("machine", results["machine"])
        parts[name] = part
        result = "ok" if part["ok"] else "FAILED"
        say(f"{name}: {result}, {part['seconds']} s {part.get('error', '')}")
        results["ok"] = all(part["ok"] for part in parts.values())
        results["left_out"] = [other for other in own if other not in parts]
        results["seconds"] = round(time.perf_counter() - STARTED, 1)
        if name == "smoke" and not part["ok"]:
            results["stopped"] = why_stopped(part)
            say(f"stopped: {results['stopped']}")
        if values.out:
            device = str(results["machine"].get("device", "unknown"))
            write_whole(out_path(values, device), results)
        if results["stopped"]:
            break
    return results


def why_stopped(smoke: Mapping[str, Any]) -> str:
    """The first thing of the smoke test that did not hold."""
    if "error" in smoke:
        return f"smoke: {smoke['error']}"
    first = smoke["failed"][0]
    what = first.get("error", f"{first.get('value')}, wanted at most {first.get('bound')}")
    return f"smoke: {first['kind']}, {first.get('name', '')}: {what}"


def out_path(values: argparse.Namespace, device: str) -> Path:
    """`--out`'s file; auto: named after the device, the day and what was chosen."""
    if values.out != "auto":
        return Path(values.out)
    device = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    parts = "".join(f"_{name}" for name in budgets(values) if values.only)
    return folder / f"gpu_check_{device}_{date.today().isoformat()}{parts}.json"


def picture_path(values: argparse.Namespace, device: torch.device) -> Path:
    """A PNG beside `--out`'s file."""
    return out_path(values, machine(device)["device"]).with_suffix(".png")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="small sizes, on any device")
    add("--only", action="extend", nargs="+", choices=tuple(PARTS), metavar="PART")
    add("--total-seconds", type=float, help="everything has ended by then (no limit)")
    add("--seconds", action="extend", nargs="+", type=parse_seconds, metavar="[PART=]SECONDS")
    add("--models", nargs="+", choices=tuple(MODELS), help="for memory; all, while there is time")
    add("--rows", type=int, default=65536, help="memory: triplets of a step (%(default)s)")
    add("--step-seconds", type=float, help="memory: most that one step may take (what is left)")
    add("--leave-gib", type=float, default=11.7, help="memory: left free by the ballast")
    add("--cap-gib", type=float, default=12.0, help="the loss's parts: what they may allocate")
    add("--device", choices=("cuda", "cpu"), help="CUDA where there is one")
    add("--out", help="file for the results, or auto")
    add("--here", action="store_true", help="all parts in this process")
    add("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    values = parse_arguments(argv)
    if values.result is not None:  # one part, for `run_apart`
        ((name, seconds),) = budgets(values).items()
        write_whole(values.result, run_here(name, values, seconds))
        sys.stderr.flush()
        os._exit(0)  # processes that still compile for it are not waited for
    results = run_parts(values)
    print_line(results)
    return 0 if results["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
