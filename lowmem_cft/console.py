"""What a person sees: progress, tables, one-line notes. Standard error, so that results on
standard output stay clean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lowmem_cft.evaluate import SetScore
from lowmem_cft.planner import GIB
from lowmem_cft.planning import RecipePlan

_LINES = 20
"""Progress lines of a run whose output is no terminal."""


class Screen:
    """Observer of a training run (see `train.Observer`): a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._num_steps = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", visible=False, note="")

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def begin(self, num_steps: int, done: int, what: str = "training") -> None:
        self._num_steps = num_steps
        self._bar.update(
            self._task, description=what, total=num_steps, completed=done, visible=True
        )

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def step(self, line: Mapping[str, Any]) -> None:
        note = f"loss {line['loss']:.4f}  accuracy {line['accuracy']:.0%}"
        note += f"  rank {line['mean_rank']:.1f}"
        if "temperature" in line:
            note += f"  temperature {line['temperature']:.4f}"
        note += f"  {line['rows_per_s']:.1f} rows/s"
        self._bar.update(self._task, completed=line["step"], note=note)
        every = max(1, self._num_steps // _LINES)
        if not self.console.is_terminal and (
            line["step"] % every == 0 or line["step"] == self._num_steps
        ):
            self.say(f"step {line['step']}/{self._num_steps}  {note}")

    def scored(self, step: int, scores: Sequence[SetScore]) -> None:
        listed = ", ".join(f"{score.name} {100 * score.spearman:.2f}" for score in scores)
        if listed:
            self.say(f"after {step} steps: {listed}")


def plan_tables(found: RecipePlan) -> list[Table]:
    """What is held at the peak of a step, its cost, and the largest batches."""
    prediction, shape = found.prediction, found.shape
    parts = Table(title=f"Predicted peak, in the {prediction.moment} ({found.device_type})")
    parts.add_column("part")
    parts.add_column("GiB", justify="right")
    for name, size in prediction.parts.items():
        parts.add_row(name.replace("_", " "), f"{size / GIB:.3f}")
    parts.add_row("total", f"{prediction.peak_bytes / GIB:.3f}", style="bold")
    parts.add_row("limit", f"{found.limit_bytes / GIB:.3f}")
    cost = Table(title="A step")
    cost.add_column("what")
    cost.add_column("how much", justify="right")
    padding = prediction.padded_tokens / prediction.tokens - 1
    for what, value in (
        ("logical batch", f"{shape.rows:,} rows, {shape.slots:,} texts"),
        ("tokens", f"{prediction.tokens:,} and {padding:.1%} padding"),
        ("longest text", f"{shape.longest} tokens"),
        ("arithmetic", f"{prediction.flops / 1e12:,.1f} TFLOP in {found.dtype}"),
        ("cost", f"{prediction.relative_cost:.2f} x the plain step"),
    ):
        cost.add_row(what, value)
    largest = Table(title="Largest logical batch")
    largest.add_column("memory")
    largest.add_column("rows", justify="right")
    for limit, rows in found.max_logical_batch.items():
        largest.add_row(f"{limit / GIB:g} GiB", f"{rows:,}" if rows else "does not fit")
    return [parts, cost, largest]


def before_after_table(before: Sequence[SetScore], after: Sequence[SetScore]) -> Table:
    """Spearman x 100, a row per set."""
    table = Table(title="Spearman x 100")
    for column in ("set", "pairs", "before", "after", "gain"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for old, new in zip(before, after, strict=True):
        gain = new.spearman - old.spearman
        table.add_row(
            new.name,
            str(new.num_pairs),
            f"{100 * old.spearman:.2f}",
            f"{100 * new.spearman:.2f}",
            f"{100 * gain:+.2f}",
        )
    return table


def score_table(scores: Sequence[SetScore]) -> Table:
    """Spearman x 100, a row per set, and the mean."""
    table = Table(title="Spearman x 100")
    for column in ("set", "pairs", "Spearman"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for score in scores:
        pairs = f"{score.num_pairs}"
        if score.set_pairs not in (None, score.num_pairs):
            pairs += f" of {score.set_pairs}"
        table.add_row(score.name, pairs, f"{100 * score.spearman:.2f}")
    if len(scores) > 1:
        mean = sum(score.spearman for score in scores) / len(scores)
        table.add_row("mean", "", f"{100 * mean:.2f}", style="bold")
    return table
