"""The records of a reproduction: what was asked for, and one file a stage.

F/reproduction.json   paper, model, recipe, command, share of the published run, machine, versions
F/stages/NAME.json    a stage that was run: its inputs with their checksum, its time, its result
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lowmem_cft.evaluation.search.trials import Trial
from lowmem_cft.evaluation.sts.bootstrap import Interval
from lowmem_cft.papers.published import Paper
from lowmem_cft.papers.stages import Kind

BASELINE = "ablation-lr-5e-5"
"""What the other ablations are held against if the record names none: the paper's own setting."""

ABLATED = {
    "ablation-lr-5e-5": "train.learning_rate",
    "ablation-lr-5e-4": "train.learning_rate",
    "ablation-lr-5e-3": "train.learning_rate",
    "ablation-prompt": "text.template",
    "ablation-no-hard-negatives": "loss.hard_negatives",
}
"""The recipe key that an ablation changes, and no other, where it is not the baseline."""

_FIRST = ("data", "base", "train", "evaluate")
_OWN: dict[Paper, tuple[str, ...]] = {
    "cft": _FIRST,
    "prompteol": (
        "data",
        "base",
        "icl-search",
        "evaluate-icl",
        "train",
        "evaluate",
        "transfer-base",
        "transfer-trained",
    ),
}
_BEYOND: dict[Paper, tuple[str, ...]] = {
    "cft": ("icl-search", "transfer-base", "transfer-trained"),
    "prompteol": (),
}
"""Stages that the paper itself does not have."""


class _Record(BaseModel):
    """Keys that the report does not use are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


def _without_folder(path: str) -> str:
    """An absolute path says where it lies on one machine only: its last part stays."""
    return Path(path).name if Path(path).is_absolute() else path


_Path = Annotated[str, AfterValidator(_without_folder)]


class Share(_Record):
    """How much of the published run this is: ours, then the published number."""

    training_steps: tuple[int, int | None] | None = None
    ablation_steps: tuple[int, int | None] | None = None
    transfer_rows_per_split: int | None = None
    """None: all rows."""
    icl_pairs: tuple[int, int] | None = None
    hours: float | None = None
    budget: str | None = None


class Reproduction(_Record):
    paper: Paper
    model: str
    recipe: str
    command: str
    share: Share
    ablation_baseline: str | None = None
    departures: list[str] = []
    machine: dict[str, str] = {}
    versions: dict[str, str] = {}

    @property
    def baseline(self) -> str:
        return self.ablation_baseline or BASELINE

    @property
    def ablations(self) -> list[str]:
        """The training stages of ablations, the baseline among them; none in the second paper."""
        return [] if self.paper != "cft" else list(dict.fromkeys((self.baseline, *ABLATED)))

    @property
    def own_stages(self) -> list[str]:
        """Those of the paper, in order."""
        each = [stage for name in self.ablations for stage in (name, f"evaluate-{name}")]
        return [*_OWN[self.paper], *each]

    @property
    def stages_beyond(self) -> list[str]:
        """Those that the paper does not have, but its model can do."""
        return list(_BEYOND[self.paper])


class Stage(_Record):
    name: str
    kind: Kind
    what: str
    inputs: dict[str, Any]
    inputs_sha256: str
    seconds: float
    flops: float | None = None
    finished: datetime
    versions: dict[str, str] = {}
    result: dict[str, Any]


# --- results by kind ----------------------------------------------------------------------


class SetResult(_Record):
    """Correlations are -1 to 1."""

    name: str
    spearman: float
    num_pairs: int
    set_pairs: int | None = None
    own_text: bool = True
    interval: Interval


class Resampling(_Record):
    resamples: int


class Evaluation(_Record):
    """`report` is the evaluation's file, relative to the folder."""

    model: str
    protocol: str
    protocol_name: str | None = None
    complete: bool
    mean: float
    mean_interval: Interval
    sets: list[SetResult] = Field(min_length=1)
    bootstrap: Resampling
    report: str


class Source(_Record):
    path: _Path
    rows: int
    sha256: str | None
    """Of a file; the hub's data sets and folders have none."""


class Data(_Record):
    sources: list[Source]
    rows: int
    published_rows: int
    distinct_texts: int
    texts_in_evaluation: int
    """Of the distinct texts, those that stand word for word in the sets that are scored."""


class Curve(_Record):
    """Spearman (-1 to 1) by step; step 0 is the base model."""

    set: str
    points: list[tuple[int, float]]


class Metrics(_Record):
    train_seconds: float | None = None
    rows_per_s: float | None = None
    peak_bytes: int | None = None
    plan: dict[str, Any] = {}
    device: str | None = None


class Training(_Record):
    run: _Path
    steps: int
    published_steps: int | None = None
    learning_rate: float
    logical_batch: int
    rows: int
    losses: list[tuple[int, float]]
    curve: Curve | None = None
    metrics: Metrics


class Search(_Record):
    """`trials` stand best first."""

    trials: list[Trial]
    set: str
    pairs: int
    template: str
    best_template: str


class TaskScore(_Record):
    """The accuracy is 0 to 1; rows by split."""

    name: str
    accuracy: float
    protocol: str
    num_rows: dict[str, int]
    task_rows: dict[str, int]


class Transfer(_Record):
    tasks: list[TaskScore]
    mean: float | None = None


_RESULTS: dict[Kind, type[_Record]] = {
    "evaluate": Evaluation,
    "data": Data,
    "train": Training,
    "search": Search,
    "transfer": Transfer,
}

R = TypeVar("R", bound=_Record)


@dataclass(frozen=True)
class Records:
    """A folder's records; `results` are checked, by stage."""

    folder: Path
    reproduction: Reproduction
    stages: dict[str, Stage]
    """The paper's own in their order, then the others."""
    results: dict[str, _Record]

    def get(self, name: str, kind: type[R]) -> R | None:
        """The result of a stage, or None where it was not run.

        Raises:
            ValueError: the stage is of another kind.
        """
        found = self.results.get(name)
        if found is not None and not isinstance(found, kind):
            raise ValueError(
                f"{self.folder / 'stages' / name}.json: got kind {self.stages[name].kind!r}, "
                f"wanted a result of {kind.__name__.lower()}; do it anew with `redo` {name}"
            )
        return found

    def all(self, kind: type[R]) -> dict[str, R]:
        """Every result of a kind, by stage."""
        return {name: found for name, found in self.results.items() if isinstance(found, kind)}

    @property
    def not_run(self) -> list[str]:
        """Of the paper's own stages."""
        return [name for name in self.reproduction.own_stages if name not in self.stages]


def _parse(path: Path, kind: type[R]) -> R:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); it is written by `lowmem-cft reproduce`"
        ) from error
    except ValidationError as error:
        raise ValueError(_explain(path, error)) from None


def _explain(path: Path, error: ValidationError, prefix: str = "") -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join([prefix] * bool(prefix) + [str(part) for part in first["loc"]])
    return (
        f"{path}: no record of a reproduction ({where or 'file'}: {first['msg']}); remove it and "
        "give the command again"
    )


def read(folder: Path) -> Records:
    """All records of a folder.

    Raises:
        ValueError: `reproduction.json` is missing, or a record is damaged.
    """
    reproduction = _parse(folder / "reproduction.json", Reproduction)
    stages: dict[str, Stage] = {}
    results: dict[str, _Record] = {}
    order = [*reproduction.own_stages, *reproduction.stages_beyond]
    files = {path.stem: path for path in sorted((folder / "stages").glob("*.json"))}
    for name in sorted(files, key=lambda name: order.index(name) if name in order else len(order)):
        stage = _parse(files[name], Stage)
        if stage.name != name:
            raise ValueError(f"{files[name]}: got a record of {stage.name!r}; name it {name!r}")
        stages[name] = stage
        try:
            results[name] = _RESULTS[stage.kind].model_validate(stage.result)
        except ValidationError as error:
            raise ValueError(_explain(files[name], error, "result")) from None
    return Records(folder, reproduction, stages, results)
