"""A list of stages done one after the other; what each found is kept, so that none is done twice.

A stage's record says what its result depends on (`inputs`, with a checksum that covers those of
the stages it needs), so that a number can be traced, and a changed input is noticed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, Protocol

from lowmem_cft.files import digest, read_json, write_json
from lowmem_cft.machine import library_versions
from lowmem_cft.progress import Counts
from lowmem_cft.training import trainer

Kind = Literal["evaluate", "data", "train", "search", "transfer"]


class Observer(Counts, trainer.Observer, Protocol):
    """Is told how a stage goes, whether it trains, scores or searches."""


@dataclass(frozen=True)
class Effort:
    """An estimate of a stage's arithmetic and memory."""

    flops: float
    memory_bytes: int


@dataclass(frozen=True)
class Stage:
    """`inputs` gives all that the result of `work` depends on, both as JSON values.

    `needs` names stages whose records must be there; `effort` may take seconds to tell.
    """

    name: str
    kind: Kind
    what: str
    inputs: Callable[[], dict[str, Any]]
    work: Callable[[Observer], dict[str, Any]]
    needs: tuple[str, ...] = ()
    effort: Callable[[], Effort] = lambda: Effort(0.0, 0)
    forget: Callable[[], None] = lambda: None
    """Put away what an earlier try left, so that `work` begins anew."""


class Records:
    """FOLDER/stages/NAME.json of every stage that is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "stages"

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _seconds_path(self, name: str) -> Path:
        return self.folder / f"{name}.seconds"

    def forget(self, name: str) -> None:
        """As if it had never been tried."""
        self.path(name).unlink(missing_ok=True)
        self._seconds_path(name).unlink(missing_ok=True)

    @contextmanager
    def timed(self, name: str) -> Iterator[Callable[[], float]]:
        """Tells the seconds spent on a stage, tries that were stopped among them.

        Raises:
            ValueError: those of before cannot be read.
        """
        path, started = self._seconds_path(name), time.perf_counter()
        try:
            before = float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0
        except ValueError as error:
            raise ValueError(f"{path}: wanted seconds ({error}); remove it") from error

        def spent() -> float:
            return before + time.perf_counter() - started

        try:
            yield spent
        except BaseException:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{spent():.1f}", encoding="utf-8")
            raise
        path.unlink(missing_ok=True)

    def get(self, name: str) -> dict[str, Any] | None:
        """The record, or None.

        Raises:
            ValueError: it cannot be read.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        keys = ("result", "inputs", "inputs_sha256", "seconds", "flops", "kind")
        return read_json(path, "remove it", *keys)

    def result(self, name: str) -> dict[str, Any]:
        """Of a stage that is done."""
        record = self.get(name)
        assert record is not None, f"{name} is needed before it is done"
        found: dict[str, Any] = record["result"]
        return found

    def write(self, stage: Stage, inputs: dict[str, Any], seconds: float, result: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "name": stage.name,
            "kind": stage.kind,
            "what": stage.what,
            "inputs": inputs,
            "inputs_sha256": digest(inputs),
            "seconds": round(seconds, 1),
            "flops": stage.effort().flops,
            "versions": library_versions(),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "result": result,
        }
        write_json(self.path(stage.name), record)


def _with_needs(stage: Stage, records: Records) -> dict[str, Any] | None:
    """The stage's inputs and the checksums of what it needs; None where that is not done."""
    needed = {name: records.get(name) for name in stage.needs}
    if any(record is None for record in needed.values()):
        return None
    sums = {name: record["inputs_sha256"] for name, record in needed.items() if record is not None}
    return {**stage.inputs(), "needs": sums}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key} was {old!r}, is {new!r}")
    return found


def check_unchanged(stages: Sequence[Stage], records: Records, redo: Sequence[str] = ()) -> None:
    """Refuse to mix results, before any work.

    Raises:
        ValueError: a stage is done with other inputs than it would have now.
    """
    for stage in stages:
        if stage.name not in redo:
            _check(stage, records)


def _check(stage: Stage, records: Records) -> None:
    record = records.get(stage.name)
    now = None if record is None else _with_needs(stage, records)
    if record is not None and now is not None and digest(now) != record["inputs_sha256"]:
        changed = "; ".join(_differences(record["inputs"], now)[:3])
        raise ValueError(
            f"{records.path(stage.name)}: done with other inputs ({changed}); do it anew with "
            f"`redo` {stage.name}, or choose another `out`"
        )


def run_stages(
    stages: Sequence[Stage],
    records: Records,
    observer: Observer,
    *,
    redo: Sequence[str] = (),
    done: Callable[[], object] = lambda: None,
) -> None:
    """Do the stages that have no record yet, in their order.

    Args:
        redo: names of stages to do in any case, from their beginning.
        done: called after each.

    Raises:
        ValueError: a stage is done with other inputs, one that it needs is not done, or one to do
            anew is not among them.
    """
    names = [stage.name for stage in stages]
    for name in redo:
        if name not in names:
            raise ValueError(f"`redo`: got {name!r}, wanted one of {', '.join(names)}")
    check_unchanged(stages, records, redo)
    for place, stage in enumerate(stages, 1):
        title = f"[{place}/{len(stages)}] {stage.name}: {stage.what}"
        if records.get(stage.name) is not None and stage.name not in redo:
            _check(stage, records)  # an earlier one may have been done anew
            observer.say(f"{title}: done before")
            continue
        inputs = _with_needs(stage, records)
        if inputs is None:
            missing = [name for name in stage.needs if records.get(name) is None]
            raise ValueError(
                f"stage {stage.name} needs {', '.join(missing)}: do it first, or add "
                f"`stages` {missing[0]}"
            )
        observer.say(title)
        if stage.name in redo:
            stage.forget()
            records.forget(stage.name)
        with records.timed(stage.name) as spent:
            result = stage.work(observer)
            records.write(stage, inputs, spent(), result)
        done()
