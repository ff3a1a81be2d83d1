"""The process that compares: all runs of both sides, and whether they did the same work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import in_turn, median, run_fresh, say, versions

MAX_DIFFERENCE = 0.02
"""Relative difference of the first losses up to which both sides are said to do the same."""

DESCRIPTION = (
    "This trainer beside sentence-transformers' cached contrastive loss, on the same work."
)

_QUICK = {"steps": 3, "batch": 32, "keep_layers": 4}


def summary(results: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """One side over its runs: medians."""

    def middle(key: str) -> float:
        return median([result[key] for result in results])

    speeds = [batch * len(result["seconds"]) / sum(result["seconds"]) for result in results]
    return {
        "triplets_per_s": round(median(speeds), 3),
        "step_s": round(median([s for result in results for s in result["seconds"]]), 4),
        "peak_bytes": int(middle("peak_bytes")),
        "base_bytes": int(middle("base_bytes")),
        "training_bytes": int(middle("training_bytes")),
        "sts_dev": round(middle("sts_dev"), 5),
        "sts_dev_before": round(middle("sts_dev_before"), 5),
        "first_loss": round(median([result["losses"][0] for result in results]), 5),
        "last_loss": round(median([result["losses"][-1] for result in results]), 5),
        "chunks": results[0]["chunks"],
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Why these two runs are not the same work; empty if they are."""
    reasons = []
    first, other = ours["losses"][0], theirs["losses"][0]
    if not abs(first - other) <= MAX_DIFFERENCE * abs(first):
        reasons.append(f"first losses {first:.5f} and {other:.5f}")
    start, other = ours["adapter_start"], theirs["adapter_start"]
    if not abs(start - other) <= 1e-6 * start:
        reasons.append(f"the adapters' starts (sums {start:.6f} and {other:.6f})")
    if ours["settings"] != theirs["settings"]:
        reasons.append(f"settings {ours['settings']} and {theirs['settings']}")
    return reasons


def compare(options: argparse.Namespace, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """All runs of both sides, as the JSON line's values, and what makes them incomparable."""
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "st": []}
    for index in range(options.runs):
        for side in in_turn(list(results), index):
            say(f"run {index + 1} of {options.runs}: {side}")
            results[side].append(run_fresh("bench.train", [*argv, "--side", side]))
    pairs = zip(results["ours"], results["st"], strict=True)
    wrong = [text for ours, theirs in pairs for text in differences(ours, theirs)]
    ours, st = (summary(results[side], options.batch) for side in results)
    first = results["ours"][0]
    return {
        "benchmark": "vs_sentence_transformers",
        "ours": ours,
        "st": st,
        "speedup": round(ours["triplets_per_s"] / st["triplets_per_s"], 3),
        "memory_ratio": round(ours["peak_bytes"] / st["peak_bytes"], 3),
        "training_memory_ratio": round(ours["training_bytes"] / max(st["training_bytes"], 1), 3),
        "comparable": not wrong,
        "runs": options.runs,
        "settings": first["settings"],
        "machine": first["machine"],
        "versions": versions(),
    }, wrong


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options, with what `--quick` makes of them."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    add = parser.add_argument
    add("--steps", type=int, default=20)
    add("--batch", type=int, default=128, help="rows of a step (default: %(default)s)")
    add("--keep-layers", type=int, default=10, help="lowest layers kept (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-3)
    add("--rank", type=int, default=8, help="of LoRA; alpha is twice it (default: %(default)s)")
    add("--runs", type=int, default=1, help="of each side; medians are given")
    add("--mini-batch", type=int, default=32, help="theirs: texts at a time (default: %(default)s)")
    add("--mini-batch-tokens", type=int, help="theirs: tokens at a time instead")
    add("--token-budget", type=int, help="ours: padded tokens at a time (default: what fits)")
    add("--data", type=Path, help="triplets (default: $LOWMEM_CFT_DATA's, else the embedded)")
    add("--quick", action="store_true", help="tiny: to see that it runs")
    add("--side", choices=["ours", "st"], help=argparse.SUPPRESS)
    add("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(_QUICK)
    for name in ("steps", "batch", "runs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: wanted at least 1")
    return options
