"""The similarity and softmax loss, forward and backward, by us and by others: time and memory.

    python -m bench.loss                     # a few minutes; of a GPU at most 12 GiB
    python -m bench.loss --quick             # under a minute on two CPU cores
    python -m bench.loss --sizes 4096x8192x768 --dtype float32 --modes symmetric --plot loss.png

M queries choose among N documents of size D, the first M being their positives and the others hard
negatives that all queries see. Inputs are random unit vectors around 32 directions, so that some
negatives are close; everyone normalises them (as by default sentence-transformers does), unless
--as-they-are is given. Who is compared, and what its variants are, says sides.py; which
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
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import print_line, say, write_whole
from bench.loss.cases import BOUNDS, MODES, Size
from bench.loss.report import is_bad, plot, print_table, title
from bench.loss.run import HEADLINE, run
from bench.loss.sides import ST_MINI_BATCHES, make_sides
from lowmem_cft.machine import dtype_name, keep_freed_memory
from lowmem_cft_kernels import LossPath

QUICK_SIZES: dict[str, list[Size]] = {
    "cpu": [HEADLINE["cpu"][0], (512, 512, 384)],
    "cuda": [HEADLINE["cuda"][0], (4096, 4096, 768)],
}


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
    add("--dtype", nargs="+", choices=[dtype_name(dtype) for dtype in BOUNDS])
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
    comparison = run(
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
    print_table(comparison)
    if options.plot is not None:
        plot(comparison, options.plot)
    if options.out is not None:
        write_whole(options.out, comparison)
    print_line(comparison)
    bad = [row for row in comparison["rows"] if row["impl"].startswith("ours") and is_bad(row)]
    for row in bad:
        say(f"!!! {row['impl']}, {title(row)}: {row['status']}, {row['note']}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
