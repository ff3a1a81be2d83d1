"""The similarity and softmax loss, forward and backward, by us and by others: time and memory.

    python bench/loss.py                     # a few minutes; of a GPU at most 12 GiB
    python bench/loss.py --quick             # under a minute on two CPU cores
    python bench/loss.py --sizes 4096x8192x768 --dtype float32 --modes symmetric --plot loss.png

M queries choose among N documents of size D, the first M being their positives and the others hard
negatives that all queries see. Inputs are random unit vectors around 32 directions, so that some
negatives are close; everyone normalises them (as by default sentence-transformers does), unless
--as-they-are is given. Who is compared, and what its variants are, says loss_sides.py; which
variant stands in a row is in its note: the fastest of two calls each. At 16 bit gradients are to
agree with the formula within 5 % of the largest entry, at float32 within 0.1 % (an implementation
that multiplies in tf32 does not); whoever does not is `wrong` and gets no figures.

Sides take turns in going first, in every round. On CUDA a call is timed by events around it, from
an empty queue, and the L2 cache is not flushed. On a CPU the machine must be idle; freed memory is
kept, for all sides. Standard error has a table; standard output is one line of JSON:

speedup_vs_st, speedup_vs_st_best, speedup_vs_eager
                 their time by ours on the path we choose, above 1 we are faster; st is
                 sentence-transformers' loop with its default mini-batch of 32, st-best with the
                 fastest of larger ones, which hold the matrix; at the sizes that `headline` names:
                 2048x4096x576 in float32 on a CPU, 16384x32768x2304 in float16 on CUDA, or the
                 largest at which both have a time
peak_tflops      of a large matrix product, by dtype, in this run
stopped          only where a side's error left the device unusable: whose, and what it was. Nobody
                 has a time at that size, and nothing follows
rows             one for each size, dtype, mode and implementation. status: ok, wrong, unsupported,
                 absent, skipped, failed; note says why or how. ms_median, ms_p20, ms_p80: one
                 forward and backward. by_ours: median of the rounds' ratios to our time.
                 extra_bytes: peak beyond the inputs and beyond gradients in the inputs' dtype
                 (ours are float32), in a call that is not timed; allocated on CUDA, tensors that
                 operations return on a CPU. useful_tflops: 6 M N D by the time, in both modes;
                 share_of_peak: of peak_tflops. max_rel_error: largest difference by largest entry
                 of the formula's gradient in float64 (float32 above 1e11 products)
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loss_report import Row, plot, print_table, title
from loss_sides import MODES, ST_MINI_BATCHES, Side, Task, Work, make_sides
from lowmem_cft.machine import keep_freed_memory
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft_kernels import LossPath
from measure import machine, median, print_line, synchronize, versions, write_whole

Size = tuple[int, int, int]
"""M, N, D."""

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
QUICK_SIZES: dict[str, list[Size]] = {
    "cpu": [HEADLINE["cpu"][0], (512, 512, 384)],
    "cuda": [HEADLINE["cuda"][0], (4096, 4096, 768)],
}
LIMIT_BYTES = {"cpu": 16 * 2**30, "cuda": 12 * 2**30}
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest relative error of a gradient that passes, by dtype of the inputs."""

_EXACT_PRODUCTS = 10**11
_BLOCK = 64 * 2**20
"""Bytes of logits that the formula holds at once."""


def make_task(
    size: Size, mode: str, dtype: torch.dtype, device: torch.device, temperature: float, norm: bool
) -> Task:
    """Random unit vectors around 32 directions; a positive gets about half of its softmax.

    Vectors of one direction have a cosine of about 0.5. Vectors without such neighbours would put
    nothing of the negatives into the gradients, and a positive that is far closer than they are
    would leave little of the gradients beyond rounding.
    """
    m, n, d = size
    if not 0 < m <= n:
        raise ValueError(f"size: got {m}x{n}x{d}, wanted 0 < M <= N")
    draw = torch.Generator(device).manual_seed(0)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, generator=draw, device=device), dim=1)

    center_KD = unit(32)
    topic_N = torch.arange(n, device=device) % m % len(center_KD)
    own_MD, own_ND = unit(m), unit(n)
    # what a positive shares with its query beside the direction: 1 would make them equal
    share = min(0.9, 2 * temperature * math.log(max(1.0, n / len(center_KD))))
    own_ND[:m] = share * own_MD + math.sqrt(1 - share**2) * own_ND[:m]
    query_MD = F.normalize(center_KD[topic_N[:m]] + own_MD, dim=1)
    doc_ND = F.normalize(center_KD[topic_N] + own_ND, dim=1)
    return Task(query_MD.to(dtype), doc_ND.to(dtype), mode, temperature, norm)


def wanted_gradients(task: Task) -> tuple[Tensor, Tensor]:
    """(M, D) and (N, D) by the formula, block of queries by block of queries."""
    m, n, d = task.size
    exact = torch.float64 if m * n * d <= _EXACT_PRODUCTS else torch.float32
    raw = task.query_MD.to(exact), task.doc_ND.to(exact)
    query_MD, doc_ND = (task.prepared(x) for x in raw)
    temperature = task.temperature
    blocks = torch.split(query_MD, max(1, _BLOCK // (n * exact.itemsize)))
    row_parts, col_M = [], query_MD.new_full((m,), -torch.inf)
    for block_RD in blocks:
        logit_RN = block_RD @ doc_ND.T / temperature
        row_parts.append(logit_RN.logsumexp(dim=1))
        col_M = torch.logaddexp(col_M, logit_RN[:, :m].logsumexp(dim=0))
    d_query_MD, d_doc_ND = torch.empty_like(query_MD), torch.zeros_like(doc_ND)
    start = 0
    for block_RD, row_R in zip(blocks, row_parts, strict=True):
        rows = torch.arange(start, start + len(block_RD), device=query_MD.device)
        logit_RN = block_RD @ doc_ND.T / temperature
        grad_RN = (logit_RN - row_R[:, None]).exp()
        if task.symmetric:
            grad_RN[:, :m] += (logit_RN[:, :m] - col_M).exp()
            grad_RN /= 2
        grad_RN[torch.arange(len(rows), device=rows.device), rows] -= 1
        grad_RN /= m * temperature
        d_query_MD[rows] = grad_RN @ doc_ND
        d_doc_ND += grad_RN.T @ block_RD
        start += len(rows)
    if task.normalize:
        for x, unit, d_x in zip(raw, (query_MD, doc_ND), (d_query_MD, d_doc_ND), strict=True):
            d_x -= unit * torch.linalg.vecdot(unit, d_x)[:, None]
            d_x /= torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return d_query_MD, d_doc_ND


def relative_error(got: Sequence[Tensor], wanted: Tensor) -> float:
    """Largest difference by the largest entry; not a number is infinitely wrong."""
    if sum(len(piece) for piece in got) != len(wanted):
        return math.inf
    worst, start = wanted.new_zeros(()), 0
    for piece in got:
        difference = piece.to(wanted.dtype) - wanted[start : start + len(piece)]
        worst = torch.maximum(worst, difference.abs().amax())
        start += len(piece)
    error = float(worst / wanted.abs().amax())
    return error if math.isfinite(error) else math.inf


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, from an empty queue to its end."""
    synchronize(device)
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e3
    make_event: Any = torch.cuda.Event
    start, end = (make_event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def extra_bytes(work: Work, task: Task) -> int:
    """Peak of one call beyond the inputs, and beyond gradients in the inputs' dtype."""
    device, inputs = task.query_MD.device, (task.query_MD, task.doc_ND)
    if device.type == "cuda":
        release(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with LiveBytes(known=inputs) as live:
            work()
        peak = live.peak
    return max(0, peak - sum(x.nbytes for x in inputs))


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large product, median of seven; of a smaller one where that takes long."""

    def times(size: int, repeats: int) -> list[float]:
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        return [timed(lambda: torch.matmul(a, b, out=out), device) for _ in range(repeats)]

    size = PEAK_SIZE[device.type] // 8
    while size < PEAK_SIZE[device.type] and times(size, 2)[1] < 100:
        size *= 2
    return 2 * size**3 / median(times(size, 9)[2:]) / 1e9


@contextmanager
def limited(device: torch.device, limit_bytes: int) -> Iterator[None]:
    """On CUDA no more than that can be allocated; elsewhere nothing happens."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    share = limit_bytes / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, share), device)
    try:
        yield
    finally:
        with suppress(torch.AcceleratorError):  # of a broken device, where it no longer matters
            torch.cuda.set_per_process_memory_fraction(before, device)


def release(device: torch.device) -> None:
    """Give freed device memory back, so that nobody runs out for what another has kept."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


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


def judge(entry: Entry, task: Task, wanted: tuple[Tensor, Tensor], limit_bytes: int) -> None:
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
            error = max(relative_error(*pair) for pair in zip(work(), wanted, strict=True))
            trial_ms = min(timed(work, device) for _ in range(2)) if error <= bound else math.inf
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
        turn = index % max(1, len(running))
        for entry in running[turn:] + running[:turn]:
            if entry.work is None:
                continue
            try:
                entry.times.append(timed(entry.work, device))
            except Exception as problem:
                entry.stop(*what_happened(problem, entry.side, device))


def digits(value: float) -> float:
    """Four that count."""
    return float(f"{value:.4g}")


def make_row(entry: Entry, task: Task, ours: Entry | None, peak_tflops: float) -> Row:
    (m, n, d), error = task.size, entry.error
    row: Row = {
        "impl": entry.side.name,
        "m": m,
        "n": n,
        "d": d,
        "dtype": str(task.query_MD.dtype).removeprefix("torch."),
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
    device, wanted = task.query_MD.device, wanted_gradients(task)
    for entry in entries:
        try:
            judge(entry, task, wanted, limit_bytes)
        except Exception as problem:
            entry.stop(*what_happened(problem, entry.side, device))
        release(device)


def speedup(rows: Sequence[Row], rival: str, size: Size, dtype: str) -> tuple[float | None, str]:
    """The rival's time by ours where the headline is, else where the most is multiplied."""
    found = [r for r in rows if r["impl"] == rival and r["mode"] == "one_way" and r["by_ours"]]
    if not found:
        return None, "none"

    def rank(row: Row) -> tuple[bool, int]:
        there = (row["m"], row["n"], row["d"]) == size and row["dtype"] == dtype
        return there, row["m"] * row["n"] * row["d"]

    best = max(found, key=rank)
    return best["by_ours"], f"{best['m']}x{best['n']}x{best['d']} {best['dtype']} one_way"


def headline(rows: Sequence[Row], device_type: str) -> dict[str, Any]:
    """The three speedups, and under `headline` where each was measured."""
    size, dtype = HEADLINE[device_type]
    rivals = {"speedup_vs_st": "st", "speedup_vs_st_best": "st-best", "speedup_vs_eager": "eager"}
    found = {name: speedup(rows, rival, size, dtype) for name, rival in rivals.items()}
    places = {name: place for name, (_, place) in found.items()}
    return {name: value for name, (value, _) in found.items()} | {"headline": places}


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
    """Compare at every size, dtype and mode; the values of the JSON line (see the module).

    Args:
        sizes, dtypes, sides: those of the device, float16 or float32, and `make_sides()` if None.
        rounds: at most; fewer, but three, where they would take longer than `budget_s`.
        seconds: after so many nothing new is started.
        limit_bytes: who may need more on a CPU is left out; on CUDA nobody gets more.
    """
    started, kind = time.perf_counter(), device.type
    headline_dtype = HEADLINE[kind][1]
    sizes = SIZES[kind] if sizes is None else sizes
    dtypes = [getattr(torch, headline_dtype)] if dtypes is None else dtypes
    sides = make_sides() if sides is None else sides
    limit_bytes = LIMIT_BYTES[kind] if limit_bytes is None else limit_bytes
    rows: list[Row] = []
    stopped: dict[str, str] = {}
    with limited(device, limit_bytes):
        peaks = {dtype: matrix_peak(dtype, device) for dtype in dtypes}
        for size, dtype, mode in product(sizes, dtypes, modes):
            if time.perf_counter() - started > seconds:
                say(f"no time left for {size}, {dtype}, {mode}")
                continue
            task = make_task(size, mode, dtype, device, temperature, normalize)
            try:
                rows += compare(
                    task,
                    sides,
                    rounds=rounds,
                    budget_s=budget_s,
                    limit_bytes=limit_bytes,
                    peak_tflops=peaks[dtype],
                )
            except DeviceBroken as problem:
                rows += problem.rows
                stopped = {"stopped": str(problem)}
                say(f"!!! stopped: {problem}")
                break
            del task
            release(device)
            say(f"{time.perf_counter() - started:4.0f} s: {size}, {dtype}, {mode}")
    packages = ("lowmem-cft", "torch", "triton", "sentence-transformers")
    rivals = ("memeff", "inf-cl", "cut-cross-entropy", "liger-kernel")
    return {
        "benchmark": "loss",
        **stopped,
        **headline(rows, device.type),
        "peak_tflops": {str(dtype)[6:]: digits(peak) for dtype, peak in peaks.items()},
        "temperature": temperature,
        "normalize": normalize,
        "rows": rows,
        "machine": machine(device),
        "versions": versions((*packages, *rivals)),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_size(text: str) -> Size:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text}, wanted MxNxD such as 2048x4096x576")
    m, n, d = map(int, parts)
    if n < m:
        raise argparse.ArgumentTypeError(f"got {text}, wanted N >= M, a positive for each query")
    return m, n, d


def parse(argv: Sequence[str]) -> argparse.Namespace:
    names = [side.name for side in make_sides(tuple(LossPath))]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--sizes", nargs="+", type=parse_size, help="MxNxD")
    add("--dtype", nargs="+", choices=[str(dtype)[6:] for dtype in BOUNDS])
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--sides", nargs="+", choices=names, help="only these")
    add("--paths", nargs="+", choices=[path.value for path in LossPath], default=[], help="of ours")
    add("--mini-batches", nargs="+", type=int, help="of st, the best of which counts")
    add("--rounds", type=int, default=9, help="at most (default: %(default)s)")
    add("--budget", type=float, default=10.0, help="seconds of all rounds at one size and mode")
    add("--seconds", type=float, default=300.0, help="nothing is started after that")
    add("--temperature", type=float, default=0.05)
    add("--as-they-are", action="store_true", help="nobody normalises")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--limit-gib", type=float, help="most memory; default 16, on CUDA 12")
    add("--plot", type=Path, metavar="FILE", help="a PNG; needs matplotlib")
    add("--out", type=Path, metavar="FILE", help="write the JSON object here too")
    add("--quick", action="store_true", help="two sizes, 3 rounds, no torch.compile")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    device = torch.device(options.device)
    keep_freed_memory()
    mini_batches = options.mini_batches or ((1024,) if options.quick else ST_MINI_BATCHES)
    sides = make_sides([LossPath(path) for path in options.paths], mini_batches)
    sides = [side for side in sides if options.sides is None or side.name in options.sides]
    sizes = options.sizes
    if options.quick:
        sizes = sizes or QUICK_SIZES[device.type]
        sides = [side for side in sides if side.name != "compile"]
    found = run(
        device,
        sizes,
        options.dtype and [getattr(torch, name) for name in options.dtype],
        options.modes,
        sides,
        rounds=min(3, options.rounds) if options.quick else options.rounds,
        budget_s=options.budget,
        seconds=options.seconds,
        limit_bytes=options.limit_gib and int(options.limit_gib * 2**30),
        temperature=options.temperature,
        normalize=not options.as_they_are,
    )
    print_table(found)
    if options.plot is not None:
        plot(found, options.plot)
    if options.out is not None:
        write_whole(options.out, found)
    print_line(found)
    bad = [row for row in found["rows"] if row["impl"].startswith("ours") and is_bad(row)]
    for row in bad:
        say(f"!!! {row['impl']}, {title(row)}: {row['status']}, {row['note']}")
    return 1 if bad else 0


def is_bad(row: Row) -> bool:
    return row["status"] in ("wrong", "failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
