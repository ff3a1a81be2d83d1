"""The comparison as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One implementation at one size; `__main__.py` says what is in it."""


def title(row: Row) -> str:
    return f"{row['m']} x {row['n']} x {row['d']}, {row['dtype']}, {row['mode']}"


def print_table(comparison: dict[str, Any]) -> None:
    """All rows, on standard error."""
    from rich.console import Console
    from rich.table import Table

    table = Table("impl", box=None)
    for name in ("ms", "p20", "p80", "by ours", "extra MiB", "TFLOP/s", "of peak", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")
    last = None
    for row in comparison["rows"]:
        if title(row) != last:
            last = title(row)
            table.add_row(f"[bold]{last}", *[""] * 9)
        extra = row["extra_bytes"]
        cells = [row[key] for key in ("ms_median", "ms_p20", "ms_p80", "by_ours")]
        cells += [None if extra is None else round(extra / 2**20, 1)]
        cells += [row[key] for key in ("useful_tflops", "share_of_peak", "max_rel_error")]
        texts = ["" if cell is None else f"{cell:.4g}" for cell in cells]
        note = row["note"] if row["status"] == "ok" else f"{row['status']}: {row['note']}"
        table.add_row(f"  {row['impl']}", *texts, note)
    Console(stderr=True, width=150).print(table)


def plot(comparison: dict[str, Any], path: Path) -> None:
    """Speed and extra memory of all rows that have a time, as a PNG.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot: needs matplotlib (pip install --group bench)") from None

    rows = [row for row in comparison["rows"] if row["status"] == "ok"]
    titles = list(dict.fromkeys(title(row) for row in rows))
    names = list(dict.fromkeys(row["impl"] for row in rows))
    figure = Figure(figsize=(13, 1.5 + 0.22 * (len(rows) + len(titles))), layout="constrained")
    speed, memory = figure.subplots(1, 2, sharey=True)
    ticks, y = [], 0.0
    for name in titles:
        group = [row for row in rows if title(row) == name]
        ticks.append(y + (len(group) - 1) / 2)
        for row in group:
            color = f"C{names.index(row['impl'])}"
            label = row["impl"] if row is next(r for r in rows if r["impl"] == row["impl"]) else ""
            speed.barh(y, row["useful_tflops"], color=color, label=label)
            if row["extra_bytes"] is not None:
                memory.barh(y, max(row["extra_bytes"], 1) / 2**20, color=color)
            y += 1
        y += 1
    speed.set_yticks(ticks, titles)
    speed.invert_yaxis()
    speed.set_xlabel("useful TFLOP/s (6 M N D by the time)")
    memory.set_xlabel("MiB beyond inputs and gradients")
    memory.set_xscale("log")
    figure.legend(loc="outside lower center", ncols=max(1, len(names)), frameon=False)
    figure.suptitle(f"InfoNCE forward and backward, {comparison['machine']['device']}")
    figure.savefig(path, format="png", dpi=120)


def is_bad(row: Row) -> bool:
    return row["status"] in ("wrong", "failed")
