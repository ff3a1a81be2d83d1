"""The files of a reproduction: what was asked for, and one file for each stage that is done.

F/reproduction.json   paper, model, recipe, command, share of the published run, machine, versions
F/stages/NAME.json    a stage: its inputs with their checksum, its time, its result
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from lowmem_cft.files import write_json
from lowmem_cft.papers.paper import Share
from lowmem_cft.papers.request import Request
from lowmem_cft.papers.results import (
    Data,
    Evaluation,
    Kind,
    Record,
    Result,
    Search,
    Training,
    Transfer,
)

R = TypeVar("R", bound=Result)
AnyRecord = TypeVar("AnyRecord", bound=Record)


class RunRecord(Record):
    """What a reproduction was begun as, and the command and the machine that last went on."""

    paper: str
    model: str
    recipe: str
    command: str
    request: Request
    share: Share
    ablation_baseline: str | None = None
    departures: list[str]
    machine: dict[str, str]
    versions: dict[str, str]


class StageRecord(Record, Generic[R]):
    """A stage that is done. `inputs` are JSON values, all that the result depends on."""

    name: str
    kind: Kind
    what: str
    inputs: dict[str, Any]
    inputs_sha256: str
    seconds: float
    flops: float | None = None
    versions: dict[str, str]
    finished: datetime
    result: R


_BY_KIND: dict[Kind, type[StageRecord[Any]]] = {
    "evaluate": StageRecord[Evaluation],
    "data": StageRecord[Data],
    "train": StageRecord[Training],
    "search": StageRecord[Search],
    "transfer": StageRecord[Transfer],
}


class Records:
    """The records of a folder, as they are on disk at the moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages = folder / "stages"
        self.run_file = folder / "reproduction.json"

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> RunRecord:
        """What the folder was begun as.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        return _read(self.run_file, RunRecord)

    def write_run(self, record: RunRecord) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.run_file, record.model_dump(mode="json", exclude_unset=True))

    # -- stages ---------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self.stages / f"{name}.json"

    def _seconds_path(self, name: str) -> Path:
        return self.stages / f"{name}.seconds"

    def names(self) -> list[str]:
        """The stages that are done, in no order of meaning."""
        return sorted(path.stem for path in self.stages.glob("*.json"))

    def get(self, name: str) -> StageRecord[Any] | None:
        """The record, its result of the stage's kind; None where the stage is not done.

        Raises:
            ValueError: the record is damaged.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        kind = _read(path, StageRecord[Any]).kind
        record = _read(path, _BY_KIND[kind])
        if record.name != name:
            raise ValueError(
                f"{path}: got a record of {record.name!r}, wanted one of {name!r}; remove it"
            )
        return record

    def find(self, name: str, kind: type[R]) -> R | None:
        """The result of a stage, or None where the stage is not done.

        Raises:
            ValueError: the record is damaged, or the stage is of another kind.
        """
        record = self.get(name)
        if record is None:
            return None
        if not isinstance(record.result, kind):
            raise ValueError(
                f"{self.path(name)}: got kind {record.kind!r}, wanted a result of "
                f"{kind.__name__.lower()}; do it anew with `redo` {name}"
            )
        return record.result

    def result(self, name: str, kind: type[R]) -> R:
        """The result of a stage that is done."""
        result = self.find(name, kind)
        assert result is not None, f"{name} is needed before it is done"
        return result

    def write(self, record: StageRecord[Any]) -> None:
        self.stages.mkdir(parents=True, exist_ok=True)
        values = record.model_dump(mode="json", exclude_unset=True)
        values["finished"] = record.finished.isoformat(timespec="seconds")
        write_json(self.path(record.name), values)

    def forget(self, name: str) -> None:
        """Remove all that is known of a stage, as if it had never been tried."""
        self.path(name).unlink(missing_ok=True)
        self._seconds_path(name).unlink(missing_ok=True)

    @contextmanager
    def timed(self, name: str) -> Iterator[Callable[[], float]]:
        """Give what tells the seconds spent on a stage, with those of tries that were stopped.

        Raises:
            ValueError: the seconds of an earlier try cannot be read.
        """
        path, started = self._seconds_path(name), time.perf_counter()
        try:
            earlier = float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
        except ValueError as error:
            raise ValueError(f"{path}: wanted seconds ({error}); remove it") from error

        def spent() -> float:
            return earlier + time.perf_counter() - started

        try:
            yield spent
        except BaseException:
            self.stages.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{spent():.1f}", encoding="utf-8")
            raise
        path.unlink(missing_ok=True)


def _read(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); it is written by `lowmem-cft reproduce`"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise ValueError(
            f"{path}: no record of a reproduction ({where}: {first['msg']}); remove it and give "
            "the command again"
        ) from None
