"""A list of stages done one after the other; what each found is kept, so that none is done twice.

A stage's record says what its result depends on (`inputs`, with a checksum that covers those of
the stages it needs), so that a number can be traced, and a changed input is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

from lowmem_cft.files import digest
from lowmem_cft.machine import library_versions
from lowmem_cft.papers.records import Records, StageRecord
from lowmem_cft.papers.results import Kind, Result
from lowmem_cft.progress import Counts
from lowmem_cft.training import trainer


class Observer(Counts, trainer.Observer, Protocol):
    """Is told how a stage goes, whether it trains, scores or searches."""


@dataclass(frozen=True)
class Effort:
    """An estimate of a stage's arithmetic and memory."""

    flops: float
    memory_bytes: int

    def times(self, number: int) -> Effort:
        """The effort of doing it so often, once after the other."""
        return Effort(self.flops * number, self.memory_bytes)


@dataclass(frozen=True)
class Stage:
    """A stage and how to do it.

    Args:
        inputs: gives all that the result depends on, as JSON values.
        needs: names of the stages whose records must be there.
        effort: gives an estimate, which may take seconds.
        forget: puts away what an earlier try left, so that `work` begins anew.
    """

    name: str
    kind: Kind
    what: str
    inputs: Callable[[], dict[str, Any]]
    work: Callable[[Observer], Result]
    needs: tuple[str, ...] = ()
    effort: Callable[[], Effort] = lambda: Effort(0.0, 0)
    forget: Callable[[], None] = lambda: None


def _with_needs(stage: Stage, records: Records) -> dict[str, Any] | None:
    """The stage's inputs and the checksums of what it needs; None where that is not done."""
    checksums = {}
    for name in stage.needs:
        record = records.get(name)
        if record is None:
            return None
        checksums[name] = record.inputs_sha256
    return {**stage.inputs(), "needs": checksums}


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two sets of inputs, a phrase for each value."""
    differences = []
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += _differences(old, new, f"{path}{key}.")
        elif old != new:
            differences.append(f"{path}{key} was {old!r}, is {new!r}")
    return differences


def check_unchanged(stages: Sequence[Stage], records: Records) -> None:
    """Refuse to mix results.

    Raises:
        ValueError: a stage is done with other inputs than it would have now.
    """
    for stage in stages:
        record = records.get(stage.name)
        inputs = None if record is None else _with_needs(stage, records)
        if record is None or inputs is None or digest(inputs) == record.inputs_sha256:
            continue
        changed = "; ".join(_differences(record.inputs, inputs)[:3])
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
    check_unchanged([stage for stage in stages if stage.name not in redo], records)
    for place, stage in enumerate(stages, 1):
        title = f"[{place}/{len(stages)}] {stage.name}: {stage.what}"
        if records.get(stage.name) is not None and stage.name not in redo:
            check_unchanged([stage], records)  # an earlier one may have been done anew
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
        _do(stage, inputs, records, observer)
        done()


def _do(stage: Stage, inputs: dict[str, Any], records: Records, observer: Observer) -> None:
    with records.timed(stage.name) as spent:
        result = stage.work(observer)
        records.write(
            StageRecord[Any](
                name=stage.name,
                kind=stage.kind,
                what=stage.what,
                inputs=inputs,
                inputs_sha256=digest(inputs),
                seconds=round(spent(), 1),
                flops=stage.effort().flops,
                versions=library_versions(),
                finished=datetime.now(timezone.utc),
                result=result,
            )
        )
