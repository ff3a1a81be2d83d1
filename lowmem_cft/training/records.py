"""What a run writes of itself: a line of its log, its progress, and its metrics.

All are written here and read here. What was not set is not written, and what an older run did not
write is None.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from lowmem_cft.evaluation.sts.score import SetScore
from lowmem_cft.files import read_json, whole_file, write_json
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.run_folder import RunFolder


class _Record(BaseModel):
    # a key that this version does not know is kept: a newer one wrote it
    model_config = ConfigDict(frozen=True, extra="allow")

    def to_json(self) -> dict[str, Any]:
        """The values that were set, as JSON."""
        return self.model_dump(exclude_unset=True)


class StepLine(_Record):
    """One step.

    `accuracy` to `mean_negative` are of the batch (`lowmem_cft_kernels.Observed`), None where
    nothing counts. `padding_share` is 0 where no token is padding. The spearman is that of
    `eval_set` after the step, where it was scored.
    """

    step: int
    loss: float
    accuracy: float | None = None
    mean_rank: float | None = None
    masked_share: float | None = None
    mean_positive: float | None = None
    mean_negative: float | None = None
    temperature: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    rows_per_s: float | None = None
    tokens_per_s: float | None = None
    texts: int | None = None
    padding_share: float | None = None
    backward_tokens: int | None = None
    forward_tokens: int | None = None
    kept_tokens: int | None = None
    step_ms: float | None = None
    peak_bytes: int | None = None
    eval_set: str | None = None
    spearman: float | None = None


class Progress(BaseModel):
    """What a run has done so far, which a resumed one adds to.

    `seconds` are those spent in steps. `tokens` are real ones, `padded_tokens` what they became in
    chunks. `before` are the base model's scores. `steps_without_negatives` are the last ones in a
    row.
    """

    seconds: float = 0.0
    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    best_score: float | None = None
    best_step: int | None = None
    before: list[SetScore] = []
    steps_without_negatives: int = 0

    def add(self, seconds: float, texts: int, tokens: int, padded_tokens: int) -> None:
        """Add a step."""
        self.seconds += seconds
        self.texts += texts
        self.tokens += tokens
        self.padded_tokens += padded_tokens


class ExportRecord(_Record):
    """The export at the end of a run, and how it was checked (see `exporting.check.ExportCheck`)."""

    kind: str
    checked: bool
    num_texts: int | None = None
    min_cosine: float | None = None
    min_cosine_as_loaded: float | None = None


class Metrics(_Record):
    """A finished run.

    `before` and `after` have the same sets in one order. Rates are of the time spent in steps. The
    temperature is there where it was learned, `best_step` where the best adapter was kept.
    """

    before: list[SetScore]
    after: list[SetScore]
    protocol: str
    steps: int
    rows: int
    train_seconds: float
    rows_per_s: float | None
    tokens_per_s: float | None
    padding_share: float | None = None
    plan: StepPlan
    peak_bytes: int
    device: str
    attention: list[str] | None = None
    versions: dict[str, str]
    temperature: float | None = None
    best_step: int | None = None
    export: ExportRecord | None = None

    def write(self, run: RunFolder) -> None:
        """Write metrics.json."""
        write_json(run.metrics, self.to_json())


def read_metrics(run: RunFolder) -> Metrics:
    """The metrics of a finished run.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    return Metrics.model_validate(read_json(run.metrics, "finish the run, or remove it", "after"))


def append_line(run: RunFolder, line: StepLine) -> None:
    """Add a line to the log."""
    with run.log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line.to_json()) + "\n")


def read_lines(run: RunFolder) -> list[StepLine]:
    """The lines of the log; one that a killed run left half written is passed over."""
    if not run.log.is_file():
        return []
    lines = []
    for text in run.log.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines.append(StepLine.model_validate(values))
    return lines


def truncate_log(run: RunFolder, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    lines = [line for line in read_lines(run) if line.step <= step]
    with whole_file(run.log) as unfinished:
        unfinished.write_text(
            "".join(json.dumps(line.to_json()) + "\n" for line in lines), encoding="utf-8"
        )
