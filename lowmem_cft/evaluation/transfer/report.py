"""A model's accuracies on several transfer tasks as one report: table rows and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_cft.evaluation.clean_up import clean_up
from lowmem_cft.evaluation.transfer import tasks as transfer_data
from lowmem_cft.evaluation.transfer.score import (
    SENTEVAL,
    TransferScore,
    TransferSettings,
    check_task,
    score_task,
)
from lowmem_cft.evaluation.transfer.tasks import TransferTask
from lowmem_cft.files import short_name, write_json
from lowmem_cft.inference.embed import Embed, Vectors
from lowmem_cft.machine import library_versions
from lowmem_cft.progress import Say

FILE_NAME = "eval-transfer"
"""What the names of these reports begin with in a run's folder."""

_UNIT = 1e-3
"""Largest difference from 1 that rounding in 16 bit makes in the length of a normalised vector."""


@dataclass(frozen=True)
class Lengths:
    """The shortest and longest L2 norm of a task's embeddings: penalties depend on their scale."""

    low: float
    high: float

    @property
    def all_one(self) -> bool:
        return abs(self.low - 1) < _UNIT and abs(self.high - 1) < _UNIT


@dataclass(frozen=True)
class TransferReport:
    """`limit` is what each split was cut to, None for the protocol's rows."""

    model: str
    settings: TransferSettings
    cleaned_up: bool
    float32: bool
    limit: int | None
    scores: list[TransferScore]
    lengths: list[Lengths]

    @property
    def mean(self) -> float:
        """Plain mean of the accuracies, 0 to 1."""
        return float(np.mean([score.accuracy for score in self.scores]))

    @property
    def mean_dev(self) -> float:
        return float(np.mean([score.dev_accuracy for score in self.scores]))

    @property
    def num_tasks(self) -> int:
        """How many tasks the protocol has."""
        return len(transfer_data.SPECS)

    @property
    def all_tasks(self) -> bool:
        return len(self.scores) == self.num_tasks

    @property
    def complete(self) -> bool:
        """Whether all tasks with all their rows are in it, so that the mean is the protocol's."""
        return self.limit is None and self.all_tasks

    @property
    def file_name(self) -> str:
        """In a run's folder; a report of other tasks or options never replaces this one."""
        parts = [FILE_NAME]
        if not self.all_tasks:
            parts += ["partial", short_name(sorted(score.name for score in self.scores))]
        parts += [] if self.limit is None else [f"limit-{self.limit}"]
        parts += [self.settings.solver] * (self.settings.solver != SENTEVAL.solver)
        parts += ["clean-up"] * self.cleaned_up + ["float32"] * self.float32
        return "-".join(parts) + ".json"

    @property
    def embeddings(self) -> str:
        """What was classified, as measured."""
        if all(lengths.all_one for lengths in self.lengths):
            return "of length 1, where the papers' are not normalised"
        low, high = (
            f(getattr(x, k) for x in self.lengths) for f, k in ((min, "low"), (max, "high"))
        )
        return f"not normalised, of length {low:.3g} to {high:.3g}"

    def to_json(self) -> dict[str, Any]:
        """JSON values: accuracies 0 to 1; `complete` says whether the mean is the protocol's."""
        return {
            "model": self.model,
            "suite": "transfer",
            "solver": self.settings.solver,
            "clean_up": self.cleaned_up,
            "float32": self.float32,
            "limit": self.limit,
            "complete": self.complete,
            "embeddings": self.embeddings,
            "mean": self.mean,
            "mean_dev": self.mean_dev,
            "tasks": [
                {**asdict(score), "embedding_length": asdict(lengths)}
                for score, lengths in zip(self.scores, self.lengths, strict=True)
            ],
            "versions": library_versions(),
        }

    def write(self, path: str | PathLike[str]) -> None:
        """Write the report as JSON, never half of it."""
        write_json(Path(path), self.to_json())


def partial_reports(
    tasks: Sequence[TransferTask],
    embed: Embed,
    *,
    model: str,
    settings: TransferSettings = SENTEVAL,
    device: torch.device | str = "cpu",
    cleaned_up: bool = False,
    float32: bool = False,
    say: Say = lambda line: None,
) -> Iterator[TransferReport]:
    """Score tasks one after the other: the report so far after each, the last one whole.

    Args:
        embed: raw embeddings are the protocol's; the report says how long they were.
        device: where the regressions are solved.
        cleaned_up: apply `clean_up` to every text before it is embedded.
        float32: whether `embed` computes in float32, for the record.
        say: told each task's size, then its accuracy.

    Raises:
        ValueError: as in `score_task`; too few rows in any task are refused before all work.
    """
    for task in tasks:
        check_task(task, settings)
    scores: list[TransferScore] = []
    lengths: list[Lengths] = []
    for task in tasks:
        rows = sum(len(split.label_N) for split in task.splits.values())
        say(f"{task.name}: {rows:,} rows")
        measured = _Measured(embed, cleaned_up)
        scores.append(score_task(task, measured, settings=settings, device=device))
        lengths.append(measured.lengths)
        say(f"{task.name}: {100 * scores[-1].accuracy:.2f}")
        if scores[-1].unconverged:
            say(f"{task.name}: {scores[-1].unconverged} fits were cut off before their minimum")
        yield TransferReport(
            model, settings, cleaned_up, float32, task.limit, list(scores), list(lengths)
        )


class _Measured:
    """An embedder that cleans texts up, if asked to, and keeps how long its vectors are."""

    def __init__(self, embed: Embed, cleaned_up: bool) -> None:
        self.embed, self.cleaned_up = embed, cleaned_up
        self.lengths = Lengths(np.inf, 0)

    def __call__(self, texts: Sequence[str]) -> Vectors:
        emb_PD = self.embed([clean_up(text) for text in texts] if self.cleaned_up else texts)
        length_P = np.linalg.norm(np.atleast_2d(emb_PD), axis=1)
        self.lengths = Lengths(float(length_P.min()), float(length_P.max()))
        return emb_PD
