"""Ablations of a reproduction: what one changed value did, and whether it alone was changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lowmem_cft.papers.report.figures import Score, compared, is_whole, score
from lowmem_cft.papers.report.records import ABLATED, Evaluation, Records, Training

IGNORED = "output."
"""Where a run is written and in what form: it does not touch what is trained."""

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


def ablations(records: Records) -> Ablations:
    """All that were run, with what differs from the baseline in their inputs."""
    asked = records.reproduction
    found = {name: _ablation(records, name) for name in asked.ablations}
    baseline = found.pop(asked.baseline, None)
    return Ablations(baseline, [one for one in found.values() if one is not None])


def _ablation(records: Records, name: str) -> Ablation | None:
    training = records.get(name, Training)
    if training is None:
        return None
    scored = records.get(f"evaluate-{name}", Evaluation)
    key = ABLATED.get(name, "train.learning_rate")
    is_baseline = name == records.reproduction.baseline
    facts = _facts(records, name)
    changes: list[Change] = []
    problems: list[str] = []
    if not is_baseline:
        changes, problems = _changes(records, name, key)
    difference = None
    if scored is not None and not is_baseline:
        difference = _difference(records, scored, problems)
    whole = scored is not None and all(is_whole(one) for one in scored.sets)
    return Ablation(
        name,
        key,
        facts.get(key, _ABSENT),
        training.steps,
        "" if scored is None else ", ".join(one.name for one in scored.sets),
        None if scored is None else score(scored.mean, scored.mean_interval, whole),
        difference,
        changes,
        problems,
    )


def _difference(records: Records, scored: Evaluation, problems: list[str]) -> Score | None:
    base = records.get(f"evaluate-{records.reproduction.baseline}", Evaluation)
    if base is None:
        problems.append("no paired difference: the baseline was not scored")
        return None
    try:
        mean = compared(records.folder, base, scored).mean
    except ValueError as error:
        problems.append(f"no paired difference: {error}")
        return None
    return score(mean.difference, mean.interval)


def _changes(records: Records, name: str, key: str) -> tuple[list[Change], list[str]]:
    baseline = records.reproduction.baseline
    if baseline not in records.stages:
        return [], ["the baseline was not run: whether all else is equal was not checked"]
    before, now = _facts(records, baseline), _facts(records, name)
    changes = [
        Change(one, before.get(one, _ABSENT), now.get(one, _ABSENT), one == key)
        for one in sorted({*before, *now})
        if before.get(one) != now.get(one) and not one.startswith(IGNORED)
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


def _facts(records: Records, name: str) -> dict[str, str]:
    """What defined a training stage: recipe keys, its other inputs, and how much was done."""
    inputs = dict(records.stages[name].inputs)
    recipe = inputs.pop("recipe", None)
    if isinstance(recipe, str) and "\n" in recipe:
        recipe = yaml.safe_load(recipe)
    facts = {f"inputs.{key}": str(value) for key, value in _flat(inputs)}
    if isinstance(recipe, Mapping):
        facts |= {key: str(value) for key, value in _flat(recipe)}
    elif recipe is not None:
        facts["recipe"] = str(recipe)
    training = records.get(name, Training)
    assert training is not None, f"{name} is a training stage that was run"
    done = {"steps": training.steps, "logical_batch": training.logical_batch, "rows": training.rows}
    return facts | {f"result.{key}": str(value) for key, value in done.items()}


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys; lists of sections by their index."""
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(i): one for i, one in enumerate(value)}
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
