"""All sides on one task after another: checked, timed by turns, and written as rows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.device import Peak, capped, elapsed_ms, matrix_peak, release, synchronize
from bench.harness import digits, in_turn, machine, median, say, versions
from bench.loss.cases import (
    BOUNDS,
    MODES,
    Size,
    Task,
    exact_gradients,
    make_task,
    relative_error,
)
from bench.loss.report import Row
from bench.loss.sides import Side, Work, make_sides
from lowmem_cft.machine import dtype_name

HEADLINE: dict[str, tuple[Size, str]] = {
    "cpu": ((2048, 4096, 576), "float32"),
    "cuda": ((16384, 32768, 2304), "float16"),  # as the trainer's embeddings wait there
}
SIZES: dict[str, list[Size]] = {
    "cpu": [
        HEADLINE["cpu"][0],
        (512, 512, 384),
        (1024, 2048, 768),
        (2048, 2048, 2304),
        (4096, 4096, 768),
    ],
    "cuda": [
        HEADLINE["cuda"][0],
        (1024, 1024, 384),
        (4096, 8192, 768),
        (16384, 16384, 768),
        (32768, 65536, 384),
        (65536, 65536, 768),
        (65536, 65536, 2304),
    ],
}
LIMIT_BYTES = {"cpu": 16 * 2**30, "cuda": 12 * 2**30}

_LIBRARIES = (
    "lowmem-cft",
    "torch",
    "triton",
    "sentence-transformers",
    "memeff",
    "inf-cl",
    "cut-cross-entropy",
    "liger-kernel",
)


@dataclass
class Entry:
    """One implementation at one task, on its way to a row."""

    side: Side
    status: str = "failed"
    note: str = ""
    error: float | None = None
    work: Work | None = None
    trial_ms: float = 0.0
    extra: int | None = None
    times: list[float] = field(default_factory=list)

    def stop(self, status: str, note: str) -> None:
        self.status, self.note, self.work = status, note, None


class DeviceBroken(RuntimeError):
    """After a side's error this process can compute nothing on the device; `rows` of its task."""

    def __init__(self, side: Side, problem: Exception) -> None:
        super().__init__(f"{side.name} broke the device: {first_line(problem)}")
        self.side = side
        self.rows: list[Row] = []


def what_happened(problem: Exception, side: Side, device: torch.device) -> tuple[str, str]:
    """Status and note; keeps nothing of the exception, whose frames hold tensors.

    Raises:
        DeviceBroken: whoever comes next would fail too, by no fault of its own.
    """
    if isinstance(problem, DeviceBroken):
        raise problem
    try:
        synchronize(device)
    except Exception:
        raise DeviceBroken(side, problem) from None
    if isinstance(problem, torch.cuda.OutOfMemoryError):
        return "skipped", "out of memory"
    return "failed", first_line(problem)


def first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:200]}"


def judge(entry: Entry, task: Task, exact: tuple[Tensor, Tensor], limit_bytes: int) -> None:
    """Check the gradients of each variant, and leave the fastest correct one in the entry."""
    side, device = entry.side, task.query_MD.device
    if (reason := side.absent(device)) is not None:
        return entry.stop("absent", reason)
    if (reason := side.refuses(task)) is not None:
        return entry.stop("unsupported", reason)
    if device.type == "cpu" and (needed := side.needed_bytes(task)) > limit_bytes:
        return entry.stop("skipped", f"may need {needed / 2**30:.0f} GiB")
    bound, rejected = BOUNDS[task.query_MD.dtype], []
    for name, prepare in side.variants(task).items():
        try:
            work = prepare()
            error = max(relative_error(*pair) for pair in zip(work(), exact, strict=True))
            trial_ms = (
                min(elapsed_ms(work, device) for _ in range(2)) if error <= bound else math.inf
            )
        except Exception as problem:
            rejected.append((math.inf, *what_happened(problem, side, device), name))
            continue
        if error > bound:
            rejected.append((error, "wrong", f"off by {error:.1e}", name))
        elif entry.work is None or trial_ms < entry.trial_ms:
            entry.status, entry.note, entry.error = "ok", name, error
            entry.work, entry.trial_ms = work, trial_ms
    others = ", ".join(f"{name}: {note}" if name else note for *_, note, name in rejected)
    if entry.work is None:
        error, status, *_ = min(rejected)
        entry.error = error if status == "wrong" else None
        return entry.stop(status, others)
    if others:
        entry.note = f"{entry.note} ({others})"
    return None


def extra_bytes(work: Work, task: Task) -> int:
    """Peak of one call beyond the inputs, and beyond gradients in the inputs' dtype."""
    inputs = task.query_MD, task.doc_ND
    with Peak(task.query_MD.device, inputs) as peak:
        work()
    return max(0, peak.taken - sum(x.nbytes for x in inputs))


def measure(entries: Sequence[Entry], task: Task, rounds: int, budget_s: float) -> None:
    """Times of the correct ones, round by round, and their memory."""
    device = task.query_MD.device
    running = [entry for entry in entries if entry.work is not None]
    for entry in running:
        assert entry.work is not None
        try:
            if entry.side.counted or device.type == "cuda":
                entry.extra = extra_bytes(entry.work, task)
        except Exception as problem:
            entry.stop(*what_happened(problem, entry.side, device))
    round_s = sum(entry.trial_ms for entry in running) / 1e3
    rounds = min(rounds, max(3, int(budget_s / max(round_s, 1e-9))))
    for index in range(rounds):
        for entry in in_turn(running, index):
            if entry.work is None:
                continue
            try:
                entry.times.append(elapsed_ms(entry.work, device))
            except Exception as problem:
                entry.stop(*what_happened(problem, entry.side, device))


def make_row(entry: Entry, task: Task, ours: Entry | None, peak_tflops: float) -> Row:
    (m, n, d), error = task.size, entry.error
    row: Row = {
        "impl": entry.side.name,
        "m": m,
        "n": n,
        "d": d,
        "dtype": dtype_name(task.query_MD.dtype),
        "mode": task.mode,
        "status": entry.status,
        "max_rel_error": digits(error) if error is not None and error < math.inf else None,
        "note": entry.note,
    }
    figures = ("ms_median", "ms_p20", "ms_p80", "by_ours", "extra_bytes", "useful_tflops")
    row |= dict.fromkeys((*figures, "share_of_peak"))
    if entry.status != "ok":
        return row
    times = torch.tensor(entry.times, dtype=torch.float64)
    low, middle, high = (float(times.quantile(q)) for q in (0.2, 0.5, 0.8))
    tflops = 6 * m * n * d / middle / 1e9
    row |= {"ms_median": digits(middle), "ms_p20": digits(low), "ms_p80": digits(high)}
    row |= {"rounds": len(entry.times), "extra_bytes": entry.extra}
    row |= {"useful_tflops": digits(tflops), "share_of_peak": digits(tflops / peak_tflops)}
    if ours is not None and ours.status == "ok":
        ratios = [a / b for a, b in zip(entry.times, ours.times, strict=True)]
        row["by_ours"] = digits(median(ratios))
    return row


def compare(
    task: Task,
    sides: Sequence[Side],
    *,
    rounds: int,
    budget_s: float,
    limit_bytes: int,
    peak_tflops: float,
) -> list[Row]:
    """All implementations on one task.

    Raises:
        DeviceBroken: with rows in which nobody has a time.
    """
    entries = [Entry(side) for side in sides]
    try:
        judge_all(entries, task, limit_bytes)
        measure(entries, task, rounds, budget_s)
    except DeviceBroken as problem:
        for entry in entries:
            if entry.side is problem.side:
                entry.stop("failed", str(problem))
            elif entry.work is not None or not entry.note:
                entry.stop("skipped", str(problem))
        problem.rows = [make_row(entry, task, None, peak_tflops) for entry in entries]
        raise
    ours = next((entry for entry in entries if entry.side.name == "ours"), None)
    return [make_row(entry, task, ours, peak_tflops) for entry in entries]


def judge_all(entries: Sequence[Entry], task: Task, limit_bytes: int) -> None:
    """Whatever goes wrong with one is its own verdict."""
    device, exact = task.query_MD.device, exact_gradients(task)
    for entry in entries:
        try:
            judge(entry, task, exact, limit_bytes)
        except Exception as problem:
            entry.stop(*what_happened(problem, entry.side, device))
        release()


def speedup(rows: Sequence[Row], rival: str, size: Size, dtype: str) -> tuple[float | None, str]:
    """The rival's time by ours where the headline is, else where the most is multiplied."""
    timed = [r for r in rows if r["impl"] == rival and r["mode"] == "one_way" and r["by_ours"]]
    if not timed:
        return None, "none"

    def rank(row: Row) -> tuple[bool, int]:
        there = (row["m"], row["n"], row["d"]) == size and row["dtype"] == dtype
        return there, row["m"] * row["n"] * row["d"]

    best = max(timed, key=rank)
    return best["by_ours"], f"{best['m']}x{best['n']}x{best['d']} {best['dtype']} one_way"


def headline(rows: Sequence[Row], device_type: str) -> dict[str, Any]:
    """The three speedups, and under `headline` where each was measured."""
    size, dtype = HEADLINE[device_type]
    rivals = {"speedup_vs_st": "st", "speedup_vs_st_best": "st-best", "speedup_vs_eager": "eager"}
    speedups = {name: speedup(rows, rival, size, dtype) for name, rival in rivals.items()}
    places = {name: place for name, (_, place) in speedups.items()}
    return {name: value for name, (value, _) in speedups.items()} | {"headline": places}


def run(
    device: torch.device,
    sizes: Sequence[Size] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    modes: Sequence[str] = MODES,
    sides: Sequence[Side] | None = None,
    *,
    rounds: int = 9,
    budget_s: float = 10.0,
    seconds: float = math.inf,
    limit_bytes: int | None = None,
    temperature: float = 0.05,
    normalize: bool = True,
) -> dict[str, Any]:
    """Compare at every size, dtype and mode; the values of the JSON line, as `__main__.py` says.

    Args:
        sizes, dtypes, sides: those of the device, float16 or float32, and `make_sides()` if None.
        rounds: at most; fewer, but three, where they would take longer than `budget_s`.
        seconds: after so many nothing new is started.
        limit_bytes: who may need more on a CPU is left out; on CUDA nobody gets more.
    """
    started, kind = time.perf_counter(), device.type
    sizes = SIZES[kind] if sizes is None else sizes
    dtypes = [getattr(torch, HEADLINE[kind][1])] if dtypes is None else dtypes
    sides = make_sides() if sides is None else sides
    limit_bytes = LIMIT_BYTES[kind] if limit_bytes is None else limit_bytes
    options: dict[str, Any] = {"rounds": rounds, "budget_s": budget_s, "limit_bytes": limit_bytes}
    rows: list[Row] = []
    stopped: dict[str, str] = {}
    with capped(device, limit_bytes):
        peaks = {dtype: matrix_peak(dtype, device) / 1e12 for dtype in dtypes}
        for size, dtype, mode in product(sizes, dtypes, modes):
            if time.perf_counter() - started > seconds:
                say(f"no time left for {size}, {dtype}, {mode}")
                continue
            task = make_task(size, mode, dtype, device, temperature, normalize)
            try:
                rows += compare(task, sides, peak_tflops=peaks[dtype], **options)
            except DeviceBroken as problem:
                rows += problem.rows
                stopped = {"stopped": str(problem)}
                say(f"!!! stopped: {problem}")
                break
            del task
            release()
            say(f"{size}, {dtype}, {mode}")
    return {
        "benchmark": "loss",
        **stopped,
        **headline(rows, device.type),
        "peak_tflops": {dtype_name(dtype): digits(peak) for dtype, peak in peaks.items()},
        "temperature": temperature,
        "normalize": normalize,
        "rows": rows,
        "machine": machine(device),
        "versions": versions(_LIBRARIES),
    }
