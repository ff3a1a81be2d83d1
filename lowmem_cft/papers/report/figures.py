"""The figures of a reproduction: ours beside the published ones, and what differs between runs.

Correlations are Spearman x 100 here and accuracies percent, as the papers give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from lowmem_cft.evaluation.sts import compare
from lowmem_cft.evaluation.sts.bootstrap import Interval
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS
from lowmem_cft.papers import names
from lowmem_cft.papers.paper import Paper
from lowmem_cft.papers.published import Figure, Published, Variant
from lowmem_cft.papers.records import Records
from lowmem_cft.papers.results import Evaluation, SetResult, TaskScore, Transfer

SIDES: dict[str, tuple[str, Variant]] = {
    "base": (names.BASE, "base"),
    "icl": (names.WITH_DEMONSTRATION, "icl"),
    "trained": (names.EVALUATE, "fine-tuned"),
}
"""What is set side by side: the stage that has ours, and the published variant."""


@dataclass(frozen=True)
class Score:
    """With its 95 % interval. Not `whole`: fewer pairs or rows than published, or another text."""

    value: float
    low: float | None
    high: float | None
    whole: bool = True


@dataclass(frozen=True)
class Row:
    """A set, or the mean: by side, and by side other than `base` the difference to base."""

    name: str
    pairs: int | None = None
    ours: dict[str, Score] = field(default_factory=dict)
    published: dict[str, Figure] = field(default_factory=dict)
    differences: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class StsTable:
    """`bugs` and `row_notes` are of the published rows, by side; `problems` is what went amiss."""

    protocol: str
    sides: list[str]
    rows: list[Row]
    mean: Row
    bugs: dict[str, str]
    row_notes: dict[str, str]
    problems: list[str]


@dataclass(frozen=True)
class OtherModel:
    """A published row of another model, for orientation only."""

    name: str
    row: Published


@dataclass(frozen=True)
class TransferTable:
    """Accuracies by side; `published` is of the base model without a demonstration."""

    protocols: list[str]
    rows: list[Row]
    mean: Row
    row_note: str


# --- STS, set by set ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """What there is of a side; either may be absent."""

    name: str
    ours: Evaluation | None
    published: Published | None

    def result(self, set_name: str) -> SetResult | None:
        results = [] if self.ours is None else self.ours.sets
        return next((result for result in results if result.name == set_name), None)

    def mean(self) -> Score | None:
        if self.ours is None:
            return None
        whole = self.ours.complete and all(result.is_whole for result in self.ours.sets)
        return score(self.ours.mean, self.ours.mean_interval, whole)

    def published_mean(self) -> Figure | None:
        """Over the sets that we scored, where these are not all; None where one is not known."""
        if self.published is None or self.ours is None or self.ours.complete:
            return None if self.published is None else self.published.mean
        known = self.published.sets
        figures = [known[result.name] for result in self.ours.sets if result.name in known]
        if len(figures) < len(self.ours.sets):
            return None
        return Figure(
            value=fmean(figure.value for figure in figures),
            source="; ".join(dict.fromkeys(figure.source for figure in figures)),
            verified=all(figure.verified for figure in figures),
            note=f"computed here over the {len(figures)} sets that we scored",
        )

    def problem(self, protocol: str) -> str | None:
        """Why our mean is not comparable with a published one by the protocol."""
        if self.ours is None:
            return None
        if self.ours.protocol_name != protocol:
            return (
                f"{self.name}: scored by another protocol ({self.ours.protocol}) than the "
                f"published figures ({protocol}): the two are not comparable."
            )
        if self.ours.complete:
            return None
        return (
            f"{self.name}: our mean is over {len(self.ours.sets)} sets instead of the protocol's."
        )


def sts_table(records: Records, paper: Paper, model: str) -> StsTable:
    """Every set of the paper's protocol, and any other that was scored."""
    sides = {
        name: _Side(name, records.find(stage, Evaluation), paper.published(model, variant))
        for name, (stage, variant) in SIDES.items()
        if stage in paper.stages
    }
    protocol = paper.facts.protocol
    scored = [result.name for side in sides.values() if side.ours for result in side.ours.sets]
    listed = dict.fromkeys([*(entry.name for entry in PROTOCOLS[protocol].sets), *scored])
    rows = [_row(name, list(sides.values())) for name in listed]
    mean = Row(
        "mean",
        None,
        {name: ours for name, side in sides.items() if (ours := side.mean())},
        {name: figure for name, side in sides.items() if (figure := side.published_mean())},
    )
    problems = [problem for side in sides.values() if (problem := side.problem(protocol))]
    base = sides["base"].ours if "base" in sides else None
    for name, side in sides.items():
        if name != "base" and base is not None and side.ours is not None:
            problems += _add_differences(records.folder, base, side.ours, name, [*rows, mean])
    published = {name: side.published for name, side in sides.items() if side.published}
    return StsTable(
        protocol,
        list(sides),
        rows,
        mean,
        {name: row.bug for name, row in published.items() if row.bug},
        {name: row.note for name, row in published.items() if row.note},
        problems,
    )


def _row(set_name: str, sides: Sequence[_Side]) -> Row:
    results = {side.name: result for side in sides if (result := side.result(set_name))}
    return Row(
        set_name,
        next((result.num_pairs for result in results.values()), None),
        {name: score(r.spearman, r.interval, r.is_whole) for name, r in results.items()},
        {
            side.name: side.published.sets[set_name]
            for side in sides
            if side.published and set_name in side.published.sets
        },
    )


def score(value: float, interval: Interval, whole: bool = True) -> Score:
    """In points, of correlations -1 to 1."""
    return Score(100 * value, 100 * interval.low, 100 * interval.high, whole)


def _add_differences(
    folder: Path, base: Evaluation, here: Evaluation, side: str, rows: Sequence[Row]
) -> list[str]:
    """Put the paired differences into the rows; gives what prevented it."""
    try:
        comparison = compared(folder, base, here)
    except ValueError as error:
        return [f"{side} - base: no paired difference ({error})."]
    of_row = {row.name: row for row in rows}
    for entry in (*comparison.sets, comparison.mean):
        of_row[entry.name].differences[side] = score(entry.difference, entry.interval)
    return []


def compared(folder: Path, a: Evaluation, b: Evaluation) -> compare.Comparison:
    """B less A on the same pairs.

    Raises:
        ValueError: they are not of the same pairs, or the pairs are gone.
    """
    resamples = min(a.bootstrap.resamples, b.bootstrap.resamples)
    return compare.compare(folder / a.report, folder / b.report, resamples)


def other_models(paper: Paper, model: str) -> list[OtherModel]:
    """Fine-tuned figures of the paper's models, where it has none of this one."""
    if paper.published(model, "fine-tuned") is not None:
        return []
    return [
        OtherModel(name, row)
        for key, name in paper.facts.models.items()
        if (row := paper.published(key, "fine-tuned")) is not None
    ]


# --- transfer tasks -----------------------------------------------------------------------


def transfer_table(records: Records, paper: Paper, model: str) -> TransferTable | None:
    """None where neither side was scored and nothing is published."""
    stages = {"base": names.TRANSFER_BASE, "trained": names.TRANSFER_TRAINED}
    results = {side: records.find(stage, Transfer) for side, stage in stages.items()}
    scored = {side: result for side, result in results.items() if result is not None}
    row = paper.published(model, "transfer")
    if not scored and row is None:
        return None
    tasks = {side: {task.name: task for task in result.tasks} for side, result in scored.items()}
    figures = {} if row is None else row.sets
    listed = dict.fromkeys([*figures, *(name for side in tasks.values() for name in side)])
    rows = []
    for name in listed:
        here = {side: of_side[name] for side, of_side in tasks.items() if name in of_side}
        rows.append(
            Row(
                name,
                max((task.test_rows for task in here.values()), default=None),
                {side: _accuracy(task) for side, task in here.items()},
                {"base": figures[name]} if name in figures else {},
                _gain({side: task.accuracy for side, task in here.items()}),
            )
        )
    protocols = [task.protocol for of_side in tasks.values() for task in of_side.values()]
    note = "" if row is None else row.note
    return TransferTable(list(dict.fromkeys(protocols)), rows, _transfer_mean(scored, row), note)


def _accuracy(task: TaskScore) -> Score:
    """With Wilson's interval (JASA 22, 1927): test rows as independent draws."""
    from scipy.stats import binomtest

    rows = task.test_rows
    test = binomtest(min(rows, round(task.accuracy * rows)), rows)
    interval = test.proportion_ci(method="wilson")
    return Score(100 * task.accuracy, 100 * interval.low, 100 * interval.high, task.is_whole)


def _gain(accuracies: dict[str, float]) -> dict[str, Score]:
    if len(accuracies) < 2:
        return {}
    return {"trained": Score(100 * (accuracies["trained"] - accuracies["base"]), None, None)}


def _transfer_mean(scored: dict[str, Transfer], row: Published | None) -> Row:
    """Without intervals: a mean over tasks. The published one only beside all of its tasks."""
    means = {side: result.mean for side, result in scored.items() if result.mean is not None}
    tasks = {side: {task.name for task in scored[side].tasks} for side in means}
    ours = {
        side: Score(100 * mean, None, None, all(task.is_whole for task in scored[side].tasks))
        for side, mean in means.items()
    }
    figures = {}
    if row is not None and row.mean is not None and tasks.get("base") in (None, set(row.sets)):
        figures["base"] = row.mean
    same = len(tasks) == 2 and tasks["base"] == tasks["trained"]
    return Row("mean", None, ours, figures, _gain(means) if same else {})
