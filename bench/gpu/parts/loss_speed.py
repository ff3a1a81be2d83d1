"""The loss beside its rivals, size by size while there is time, with its picture."""

from __future__ import annotations

import importlib.util
from typing import Any

from bench.gpu.options import Options
from bench.harness import say
from bench.loss.report import Row, is_bad, plot, print_table
from bench.loss.run import SIZES, headline, run
from bench.loss.sides import make_sides

TINY_SIZE = (24, 48, 32)

_COMPARISON_SECONDS = 30.0
"""Kept for one size: nothing is begun with less."""


def check(options: Options) -> dict[str, Any]:
    """bench.loss's comparison, size by size while there is time, with its picture."""
    kind = options.device.type
    sizes = [TINY_SIZE] if options.tiny else SIZES[kind]
    sides = make_sides()
    if options.tiny:
        sides = [side for side in sides if side.name in ("ours", "eager")]
    comparison: dict[str, Any] = {}
    rows: list[Row] = []
    for size in sizes:
        if rows and options.left < _COMPARISON_SECONDS:
            say(f"  no time left from {size} on")
            break
        comparison = run(
            options.device,
            [size],
            sides=sides,
            rounds=3 if options.tiny else 9,
            budget_s=0.5 if options.tiny else 5.0,
            seconds=max(1.0, options.left - _COMPARISON_SECONDS / 2),
            limit_bytes=options.cap_bytes,
        )
        rows += comparison["rows"]
        options.note({**comparison, "rows": rows})
        if "stopped" in comparison:
            break
    comparison |= headline(rows, kind)
    ours = [row for row in rows if row["impl"].startswith("ours")]
    right = any(row["status"] == "ok" for row in ours) and not any(map(is_bad, ours))
    comparison |= {"ok": right, "rows": rows}
    print_table(comparison)
    if options.picture is not None and importlib.util.find_spec("matplotlib") is not None:
        plot(comparison, options.picture)
        say(f"  picture: {options.picture}")
    return comparison
