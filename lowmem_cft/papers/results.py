"""What the stages of a reproduction give, a class for each kind of stage.

Fields stand in the order of the files. Correlations are Spearman's, -1 to 1; accuracies 0 to 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lowmem_cft.evaluation.search.trials import Trial
from lowmem_cft.evaluation.sts.bootstrap import Interval
from lowmem_cft.evaluation.transfer.report import Lengths
from lowmem_cft.training.records import Metrics

Kind = Literal["evaluate", "data", "train", "search", "transfer"]


class Record(BaseModel):
    """JSON values of a file."""

    # a key that this version does not know is kept: a newer one wrote it
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class SetResult(Record):
    """The score of a set: see `SetScore`."""

    name: str
    spearman: float
    num_pairs: int
    set_pairs: int | None = None
    source: str = ""
    pearson: float | None = None
    version: str = ""
    own_text: bool = True
    interval: Interval
    pairs_sha256: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the set is the protocol's: all pairs, its text."""
        return self.own_text and self.set_pairs in (None, self.num_pairs)


class Resampling(Record):
    """How intervals came about."""

    resamples: int


class Evaluation(Record):
    """An STS report (see `StsReport.to_json`); `report` is its file, relative to the folder."""

    model: str
    suite: str = "sts"
    protocol: str
    protocol_name: str | None = None
    clean_up: bool = False
    float32: bool = False
    complete: bool
    mean: float
    mean_interval: Interval
    mean_pearson: float | None = None
    sets: list[SetResult] = Field(min_length=1)
    bootstrap: Resampling
    versions: dict[str, str] = {}
    report: str


class Source(Record):
    """A source of training rows; only a file has a checksum."""

    path: str
    where: dict[str, str | bool | int | float] | None = None
    rows: int
    skipped: int = 0
    sha256: str | None

    @property
    def name(self) -> str:
        """The path; an absolute one says where it lies on one machine only: its last part."""
        return Path(self.path).name if Path(self.path).is_absolute() else self.path


class Data(Record):
    """The training data; `texts_in_evaluation` of its texts stand word for word in scored sets."""

    sources: list[Source]
    rows: int
    rows_sha256: str = ""
    distinct_texts: int
    texts_in_evaluation: int
    published_rows: int


class Curve(Record):
    """Spearman by step; step 0 is the base model."""

    set: str
    points: list[tuple[int, float]]


class Training(Record):
    """A training run; `losses` are by step."""

    run: str
    steps: int
    learning_rate: float
    logical_batch: int
    rows: int
    losses: list[tuple[int, float]]
    curve: Curve | None = None
    metrics: Metrics
    published_steps: int | None = None


class Search(Record):
    """A search for a demonstration; `trials` stand best first."""

    trials: list[Trial]
    set: str
    pairs: int
    template: str
    best_template: str


class TaskScore(Record):
    """The score of a transfer task (see `TransferScore`); rows are by split."""

    name: str
    accuracy: float
    dev_accuracy: float | None = None
    protocol: str
    penalties: list[float] = []
    num_rows: dict[str, int]
    task_rows: dict[str, int]
    checksums: dict[str, str] = {}
    unconverged: int = 0
    embedding_length: Lengths | None = None

    @property
    def is_whole(self) -> bool:
        """Whether no split was cut."""
        return self.num_rows == self.task_rows

    @property
    def test_rows(self) -> int:
        """Rows tested: every row of a cross-validated task once."""
        return self.num_rows.get("test", sum(self.num_rows.values()))


class Transfer(Record):
    """A report of transfer tasks (see `TransferReport.to_json`)."""

    model: str = ""
    suite: str = "transfer"
    solver: str = ""
    clean_up: bool = False
    float32: bool = False
    limit: int | None = None
    complete: bool = False
    embeddings: str = ""
    mean: float | None = None
    mean_dev: float | None = None
    tasks: list[TaskScore]
    versions: dict[str, str] = {}


Result = Evaluation | Data | Training | Search | Transfer
