"""Dropout by identity beside torch's own, forward and backward.

    python -m bench.dropout            # under two minutes on one CPU core
    python -m bench.dropout --quick    # under 20 seconds, and noisier

Per shape and dtype, in rounds in which the sides take turns at going first:

torch    torch.nn.functional.dropout(training=True) and its backward by autograd
ours     identity_dropout on the input and on the gradient, keys given
module   IdentityDropout and its backward by autograd: ours with keys, checks and graph

The last line of standard output is one line of JSON. Its times are medians over the rounds, in ms
for one forward and backward; ratio is ours by torch's, module_ratio the module's by torch's, below
1 is faster. Of each row it is the median of the rounds' ratios; ratio_median, ratio_worst and
module_ratio_median are over the rows. On CUDA the device's queue is drained around each timing,
so launches count where they take longer than the kernels. On a CPU, times of torch and module jump
by a factor of up to three where the C library hands freed memory back to the system at once (no
side is to blame; MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ at 1000000000 rule it out).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.device import timed
from bench.harness import in_turn, machine, median, print_line, say, versions
from lowmem_cft.machine import dtype_name
from lowmem_cft.model.dropout import DropoutClock, IdentityDropout
from lowmem_cft_kernels.dropout import identity_dropout

SHAPES = [(512, 576), (2048, 576), (2048, 1536), (8192, 2304)]
DTYPES = [torch.float32, torch.bfloat16]
SIDES = ("torch", "ours", "module")


def make_sides(
    shape: tuple[int, int], dtype: torch.dtype, rate: float, device: torch.device
) -> dict[str, Callable[[], object]]:
    """One forward and backward of each side on the same tensors."""
    draw = torch.Generator().manual_seed(0)
    x_LF, grad_LF = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(2))
    leaf_LF = x_LF.clone().requires_grad_()
    clock = DropoutClock(seed=1)
    module = IdentityDropout(rate, "module", clock)
    clock.set_chunk(
        torch.zeros(1, dtype=torch.int64, device=device),
        torch.arange(shape[0], device=device)[None],
    )
    key_L, key_F = module.keys(shape[1])

    def run_torch() -> object:
        out_LF = torch.nn.functional.dropout(leaf_LF, rate, training=True)
        return torch.autograd.grad(out_LF, leaf_LF, grad_LF)

    def run_ours() -> object:
        return identity_dropout(x_LF, key_L, key_F, rate), identity_dropout(
            grad_LF, key_L, key_F, rate
        )

    def run_module() -> object:
        return torch.autograd.grad(module(leaf_LF), leaf_LF, grad_LF)

    return dict(zip(SIDES, (run_torch, run_ours, run_module), strict=True))


def seconds_of_each(side: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one of so many calls, the device's queue being drained before and after all."""
    return timed(lambda: [side() for _ in range(repeats)], device)[0] / repeats


def compare(
    sides: dict[str, Callable[[], object]], rounds: int, budget: float, device: torch.device
) -> dict[str, float]:
    """Times in ms and ratios; each timing takes about `budget` seconds."""
    for side in sides.values():
        side()  # compiles kernels, fills the allocator
    repeats = max(1, round(budget / timed(sides["torch"], device)[0]))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in in_turn(SIDES, index):
            times[name].append(seconds_of_each(sides[name], repeats, device))
    ratios = {
        name: median([a / b for a, b in zip(times[name], times["torch"], strict=True)])
        for name in ("ours", "module")
    }
    return {f"{name}_ms": round(median(taken) * 1e3, 4) for name, taken in times.items()} | {
        "ratio": round(ratios["ours"], 3),
        "module_ratio": round(ratios["module"], 3),
    }


def measure(
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    rate: float,
    rounds: int,
    budget: float,
) -> dict[str, Any]:
    """A row for each shape and dtype, and figures over all rows."""
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for shape in shapes:
            row = compare(make_sides(shape, dtype, rate, device), rounds, budget, device)
            rows.append({"shape": list(shape), "dtype": dtype_name(dtype)} | row)
            say(str(rows[-1]))
    return {
        "rows": rows,
        "ratio_median": round(median([row["ratio"] for row in rows]), 3),
        "ratio_worst": max(row["ratio"] for row in rows),
        "module_ratio_median": round(median([row["module_ratio"] for row in rows]), 3),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="3 short rounds")
    options = parser.parse_args(argv)
    rounds, budget = (3, 0.05) if options.quick else (options.rounds, 0.3)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_line(
        {
            **measure(device, SHAPES, options.rate, rounds, budget),
            "rate": options.rate,
            "rounds": rounds,
            "machine": machine(device),
            "versions": versions(("lowmem-cft", "torch", "triton")),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
