"""Ablations of a reproduction: what one changed value did, and whether it alone was changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_cft.papers import names
from lowmem_cft.papers.paper import Paper
from lowmem_cft.papers.records import Records
from lowmem_cft.papers.report.figures import Score, compared, score
from lowmem_cft.papers.results import Evaluation, Training

# where a run is written and in what form: it does not touch what is trained
_IGNORED = "output."
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Change:
    """A value that differs from the baseline's; `named` is the one that the ablation is of."""

    key: str
    baseline: str
    here: str
    named: bool


@dataclass(frozen=True)
class Ablation:
    """`value` is that of the named key; the difference is to the baseline, on the same pairs."""

    name: str
    key: str
    value: str
    steps: int
    scored_on: str
    score: Score | None
    difference: Score | None
    changes: list[Change]
    problems: list[str]


@dataclass(frozen=True)
class Ablations:
    """`baseline` is absent where it was not run; so are the others that were not."""

    baseline: Ablation | None
    others: list[Ablation]

    def of(self, key: str) -> list[tuple[Ablation, str]]:
        """The ablations of a key after the baseline, each with its value of it; else none."""
        of_key = [ablation for ablation in self.others if ablation.key == key]
        if not of_key or self.baseline is None:
            return [(ablation, ablation.value) for ablation in of_key]
        known = {change.key: change.baseline for ab in of_key for change in ab.changes}
        same = self.baseline.key == key
        value = self.baseline.value if same else known.get(key, "the same")
        return [(self.baseline, value), *((ablation, ablation.value) for ablation in of_key)]


@dataclass(frozen=True)
class _Run:
    """What a run left; `facts` are what defined it: recipe keys, other inputs, how much was done."""

    name: str
    training: Training
    evaluation: Evaluation | None
    facts: dict[str, str]


def ablations(records: Records, paper: Paper, baseline: str | None) -> Ablations:
    """All that were run, with what differs from the baseline in their inputs."""
    keys = {ablation.name: ablation.key for ablation in paper.ablations}
    order = paper.ablations_from(baseline)
    runs = {name: run for name in order if (run := _read(records, name)) is not None}
    if not order:
        return Ablations(None, [])
    base, scored = runs.pop(order[0], None), records.find(names.evaluation_of(order[0]), Evaluation)
    others = []
    for name, run in runs.items():
        changes, problems = _changes(base, run, keys[name])
        difference = None
        if run.evaluation is not None:
            try:
                difference = _difference(scored, run.evaluation, records.folder)
            except ValueError as error:
                problems.append(f"no paired difference: {error}")
        others.append(_ablation(run, keys[name], difference, changes, problems))
    return Ablations(
        None if base is None else _ablation(base, keys[base.name], None, [], []), others
    )


def _read(records: Records, name: str) -> _Run | None:
    training = records.find(name, Training)
    if training is None:
        return None
    stage = records.get(name)
    assert stage is not None, f"{name} has a result"
    inputs = {**stage.inputs}
    recipe = inputs.pop("recipe", {})
    done = {"steps": training.steps, "logical_batch": training.logical_batch, "rows": training.rows}
    facts = dict(_flat({**recipe, "inputs": inputs, "result": done}))
    return _Run(name, training, records.find(names.evaluation_of(name), Evaluation), facts)


def _ablation(
    run: _Run, key: str, difference: Score | None, changes: list[Change], problems: list[str]
) -> Ablation:
    scored = run.evaluation
    whole = scored is not None and all(result.is_whole for result in scored.sets)
    return Ablation(
        run.name,
        key,
        run.facts.get(key, _ABSENT),
        run.training.steps,
        "" if scored is None else ", ".join(result.name for result in scored.sets),
        None if scored is None else score(scored.mean, scored.mean_interval, whole),
        difference,
        changes,
        problems,
    )


def _difference(base: Evaluation | None, scored: Evaluation, folder: Path) -> Score:
    if base is None:
        raise ValueError("the baseline was not scored")
    mean = compared(folder, base, scored).mean
    return score(mean.difference, mean.interval)


def _changes(base: _Run | None, run: _Run, key: str) -> tuple[list[Change], list[str]]:
    """What differs from the baseline, and what is wrong with that."""
    if base is None:
        return [], ["the baseline was not run: whether all else is equal was not checked"]
    then, now = base.facts, run.facts
    changes = [
        Change(name, then.get(name, _ABSENT), now.get(name, _ABSENT), name == key)
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name) and not name.startswith(_IGNORED)
    ]
    problems = []
    others = [change.key for change in changes if not change.named]
    if others:
        problems.append(
            f"not everything else is equal: {', '.join(others)} "
            f"differ{'s' if len(others) == 1 else ''} too"
        )
    if len(others) == len(changes):
        problems.append(f"{key} does not differ from the baseline's: this is no ablation of it")
    return changes, problems


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Values by dotted keys; lists of sections by their index."""
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            value = {str(i): section for i, section in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", str(value)
