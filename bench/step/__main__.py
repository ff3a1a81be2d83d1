"""A step's gradient beside sentence-transformers' cached loss and the plain step: time and memory.

    python -m bench.step                    # one process a row: half an hour or more
    python -m bench.step --quick            # does it run; its figures mean nothing
    python -m bench.step --batch 256 1024 --quantization none nf4 --ablate --out steps.json

All rows do the same work on the same real triplets, from the same weights of base and LoRA: embed
the batch, the loss over all of it, and back; no optimizer. Each row has a process of its own, in
every round; sides take turns in going first. Standard output is one line of JSON; its headline
figures are those of the first batch size and quantization:

speedup_at_equal_memory     triplets per second of our fastest row that peaks no higher than their
                            fastest row, by that row's; above 1 is faster
speedup_at_half_memory      the same of our rows that peak at half of it at most
speedup_free_memory         ours_kept_all by their fastest row; speedup_planner: ours_planner by it
memory_ratio_at_equal_speed the lowest peak of ours among rows at least as fast as their fastest, by
                            that row's; below 1 is less. rss_ratio_..: of the same two rows
kept_all_cost               seconds of ours_kept_all by plain_chunks: what two phases cost
kept_none_cost              seconds of ours_kept_none by plain_chunks
st_best, ours_equal_memory, ours_half_memory, ours_equal_speed     the rows that are meant
switch_offs                 with --ablate: seconds and live bytes of ours_kept_none with one factor
                            turned off, by ours_kept_none's; above 1 the factor helps. kept_graphs:
                            ours_kept_none by ours_kept_all. freed_memory, st_freed_memory: without
                            keep_freed_memory, which all other rows of both sides call. loss:
                            milliseconds and live bytes of the loss alone, by us, by them, by formula
comparable                  every row's first loss agrees with the reference row's. If false,
                            standard error says so and the exit code is 1
rows                        every row of every run. triplets_per_s, sequences_per_s: of the batch,
                            its texts counted as often as they occur. texts, padded_tokens: those
                            that got a graph. live_bytes: peak of live tensors above the model, in
                            one step that is not timed, gradients of the adapter included. rss_bytes:
                            how far the process's peak rose above what it held before its first step
                            (resident memory with the allocator's slack, which keep_freed_memory
                            adds to; allocated memory on CUDA). loss_difference and
                            gradient_difference: relative, from the reference row, which is the
                            first of plain, plain_chunks, ours_kept_all that there is
runs                        the headline figures of every batch size and quantization

Rows: plain is one padded batch with peft's own layers and a mask, as far as memory allows.
plain_chunks has our chunks and layers, but keeps all graphs and goes backward once: the step
without gradient caching. st_N and st_tokens_N are their loss with mini-batches of N texts and of N
tokens, on texts tokenised before the clock starts. ours_planner is the planner's choice within all
free memory; ours_kept_all, ours_kept_none and ours_checkpointed (no graph kept, every layer
checkpointed) fix that choice; ours_N and ours_N_checkpointed keep none at N padded tokens a chunk;
ours_planner_equal and ours_planner_half are its choice within the live bytes of their fastest row
and within half of them.

On a CPU the machine must be idle.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

from bench.harness import in_turn, print_line, run_fresh, say, versions
from bench.step.figures import FACTORS, Row, headline, summary, switch_offs

MAX_DIFFERENCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative difference of the first losses up to which rows are said to do the same, by dtype."""

REFERENCES = ("plain", "plain_chunks", "ours_kept_all")
_QUICK = {
    "steps": 1,
    "batch": [16],
    "layers": 2,
    "mini_batches": [16],
    "mini_batch_tokens": [512],
    "budgets": [128],
}

# -- which rows ---------------------------------------------------------------------------------


def first_rows(options: argparse.Namespace) -> list[str]:
    """The rows that depend on no other, sides alternating."""
    st = [f"st_{size}" for size in options.mini_batches]
    st += [f"st_tokens_{size}" for size in options.mini_batch_tokens]
    ours = ["ours_kept_none"]
    ours += [f"ours_kept_none-{factor}" for factor in FACTORS if options.ablate]
    ours += ["ours_planner", "plain_chunks", "ours_kept_all", "ours_checkpointed"]
    for budget in options.budgets:
        ours += [f"ours_{budget}", f"ours_{budget}_checkpointed"]
    ours += ["plain"] + ["loss"] * options.ablate
    pairs = zip_longest(ours, st)
    return chosen(options, [name for name in chain.from_iterable(pairs) if name is not None])


def chosen(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    if not options.rows:
        return list(names)
    return [name for name in names if any(fnmatchcase(name, p) for p in options.rows)]


def groups(options: argparse.Namespace, names: Sequence[str]) -> list[list[str]]:
    """Rows that share a process: none, but with `--quick` all of a side."""
    if not options.quick:
        return [[name] for name in names]
    sides = [[n for n in names if not n.startswith("st_")], [n for n in names if n[:3] == "st_"]]
    return [side for side in sides if side]


# -- one batch size and quantization --------------------------------------------------------------


class Run:
    """All rows at one batch size and quantization, in fresh processes."""

    def __init__(
        self, options: argparse.Namespace, argv: Sequence[str], batch: int, quantization: str
    ) -> None:
        self.options, self.batch, self.quantization = options, batch, quantization
        self.argv = [*argv, "--batch", str(batch), "--quantization", quantization]
        self.results: dict[str, list[Row]] = {}
        self.wrong: list[str] = []
        self.facts: dict[str, Any] = {}

    def measure(self, names: Sequence[str], folder: Path, above_model: int | None = None) -> None:
        """Every row in every round; sides take turns in going first."""
        extra = [] if above_model is None else ["--above-model", str(above_model)]
        arguments = [*self.argv, *extra, "--gradients", str(folder), "--row"]
        for index in range(self.options.rounds):
            for group in in_turn(groups(self.options, names), index):
                place = f"{self.quantization}, batch {self.batch}, round {index + 1}"
                say(f"{place}: {' '.join(group)}")
                try:
                    values = run_fresh("bench.step", [*arguments, *group])
                except RuntimeError as error:  # its own process has said why
                    self.fail(group, str(error))
                    continue
                self.facts = {key: values[key] for key in ("machine", "settings")}
                for row in values["results"]:
                    self.results.setdefault(row["row"], []).append(row)

    def fail(self, group: Sequence[str], why: str) -> None:
        say(why)
        self.wrong.append(f"{', '.join(group)} failed")
        for name in group:
            self.results.setdefault(name, []).append({"row": name, "skipped": why})

    def summaries(self, folder: Path) -> dict[str, Row]:
        """Every row over its rounds, beside the reference row."""
        rows = {
            name: summary(name, results, self.batch)
            for name, results in self.results.items()
            if name != "loss"
        }
        measured = [name for name, row in rows.items() if row["skipped"] is None]
        reference = next((name for name in (*REFERENCES, *measured) if name in measured), None)
        for name in measured:
            assert reference is not None
            rows[name] |= self.differences(rows[name], rows[reference], folder)
        return {
            name: {"quantization": self.quantization, "batch": self.batch, **row}
            for name, row in rows.items()
        }

    def differences(self, row: Row, reference: Row, folder: Path) -> Row:
        """How far a row's first loss and gradient are from the reference's."""
        import numpy as np

        loss = abs(row["loss"] - reference["loss"]) / abs(reference["loss"])
        mine, other = (np.load(folder / f"{each['row']}.npy") for each in (row, reference))
        gradient = float(np.linalg.norm(mine - other) / np.linalg.norm(other))
        return {
            "reference": reference["row"],
            "loss_difference": float(f"{loss:.3g}"),
            "gradient_difference": float(f"{gradient:.3g}"),
            "comparable": loss <= MAX_DIFFERENCE[self.options.dtype],
        }


def second_rows(run: Run, folder: Path) -> None:
    """The rows that depend on which of theirs is fastest, and on its peak."""
    if run.options.quick:
        return
    rows = run.summaries(folder)
    st = headline(rows)["st_best"]
    if st is None:
        return
    for name, share in (("ours_planner_equal", 1.0), ("ours_planner_half", 0.5)):
        names = chosen(run.options, [name])
        run.measure(names, folder, int(share * rows[st]["live_bytes"]))
    if run.options.ablate:
        run.measure(chosen(run.options, [f"{st}-freed_memory"]), folder)


def measure_run(run: Run) -> tuple[list[Row], dict[str, Any]]:
    """All rows of a run, and what they say."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run.measure(first_rows(run.options), folder)
        second_rows(run, folder)
        rows = run.summaries(folder)
    for row in rows.values():
        if row.get("comparable") is False:
            run.wrong.append(f"loss of {row['row']} off by {row['loss_difference']} of itself")
    figures = headline(rows)
    if run.options.ablate:
        figures["switch_offs"] = switch_offs(rows, run.results.get("loss", []), figures["st_best"])
    return list(rows.values()), figures


def compare(options: argparse.Namespace, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """All runs, as the JSON line's values, and what makes their rows incomparable."""
    runs, rows, wrong = [], [], []
    facts: dict[str, Any] = {}
    for quantization, batch in product(options.quantization, options.batch):
        run = Run(options, argv, batch, quantization)
        rows_of_run, figures = measure_run(run)
        rows += rows_of_run
        runs.append({"quantization": quantization, "batch": batch, **figures})
        wrong += [f"{quantization}, batch {batch}: {text}" for text in run.wrong]
        facts = facts or run.facts
    return {
        "benchmark": "step",
        **runs[0],
        "comparable": not wrong,
        "runs": runs,
        "rows": rows,
        **facts,
        "versions": versions(),
    }, wrong


def append(path: Path, values: dict[str, Any]) -> None:
    """Add one object to the list in a JSON file."""
    listed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.write_text(json.dumps([*listed, values], indent=1) + "\n", encoding="utf-8")


# -- the command line -------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[256], help="triplets of a step")
    add("--quantization", nargs="+", choices=["none", "nf4"], default=["none"])
    add("--dtype", choices=sorted(MAX_DIFFERENCE), default="fp32", help="of the arithmetic")
    add("--layers", type=int, default=10, help="lowest layers kept (default: %(default)s)")
    add("--rank", type=int, default=8, help="of LoRA; alpha is twice it (default: %(default)s)")
    add("--steps", type=int, default=3, help="timed in each process (default: %(default)s)")
    add("--rounds", type=int, default=1, help="processes for each row (default: %(default)s)")
    add("--mini-batches", type=int, nargs="*", default=[4, 8, 16, 32], help="theirs, in texts")
    add("--mini-batch-tokens", type=int, nargs="*", default=[512, 2048], help="theirs, in tokens")
    add("--budgets", type=int, nargs="*", default=[128, 256, 512], help="ours, in padded tokens")
    add("--rows", nargs="+", metavar="PATTERN", help="only these, such as ours_kept_all 'st_*'")
    add("--ablate", action="store_true", help="also ours with one factor turned off at a time")
    add("--out", type=Path, help="append the JSON object to the list in this file")
    add("--quick", action="store_true", help="tiny, one process a side: to see that it runs")
    add("--row", nargs="+", help=argparse.SUPPRESS)
    add("--above-model", type=int, help=argparse.SUPPRESS)
    add("--gradients", type=Path, help=argparse.SUPPRESS)
    add("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options, with what `--quick` makes of those not given."""
    parser = make_parser()
    if parser.parse_args(argv).quick:
        parser.set_defaults(**_QUICK)
    options = parser.parse_args(argv)
    for name in ("steps", "rounds", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: wanted at least 1")
    if min(options.batch) < 2:
        parser.error("--batch: wanted at least 2")
    if options.row is None and not first_rows(options):
        parser.error(f"--rows: got {' '.join(options.rows)}, which fits none")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.row is not None:
        from bench.step.measure import measure_rows

        options.result.write_text(json.dumps(measure_rows(options)), encoding="utf-8")
        return 0
    values, wrong = compare(options, argv)
    for text in wrong:
        say(f"!!! NOT THE SAME WORK, DO NOT USE THE FIGURES: {text}")
    if options.out is not None:
        append(options.out, values)
    print_line(values)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
