"""Progress and notes, on standard error, so that results on standard output stay clean."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lowmem_cft.evaluation.sts.score import SetScore
from lowmem_cft.training.records import StepLine

_OBSERVED = (
    "of each step: accuracy, the share of rows whose positive is the most similar document of the "
    "batch; rank, the positive's mean place among its documents, 1 being the first; hidden, the share "
    "of documents that are no negatives of a row, such as copies of its positive"
)
"""What the words beside a step's loss mean."""

_LINES = 20
"""Progress lines of a run whose output is no terminal."""


class Screen:
    """Observer of a training run (see `trainer.Observer`): a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._num_steps = 0
        self._explained = False
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

    def step(self, line: StepLine) -> None:
        note = f"loss {line.loss:.4f}"
        if line.accuracy is not None:
            if not self._explained:
                self.say(_OBSERVED)
                self._explained = True
            note += f"  accuracy {line.accuracy:.0%}  rank {line.mean_rank:.1f}"
        if line.masked_share:
            note += f"  hidden {line.masked_share:.0%}"
        if line.temperature is not None:
            note += f"  temperature {line.temperature:.4f}"
        note += f"  {line.rows_per_s:.1f} rows/s"
        self._bar.update(self._task, completed=line.step, note=note)
        every = max(1, self._num_steps // _LINES)
        if not self.console.is_terminal and (
            line.step % every == 0 or line.step == self._num_steps
        ):
            self.say(f"step {line.step}/{self._num_steps}  {note}")

    def scored(self, step: int, scores: Sequence[SetScore]) -> None:
        listed = ", ".join(f"{score.name} {100 * score.spearman:.2f}" for score in scores)
        if listed:
            self.say(f"Spearman x 100 after {step} steps: {listed}")
