"""All that the report of a reproduction says, gathered from its records."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from lowmem_cft.papers import names
from lowmem_cft.papers.paper import Paper, PaperFacts
from lowmem_cft.papers.published import ChosenDemonstration, Figure
from lowmem_cft.papers.records import Records, RunRecord, StageRecord
from lowmem_cft.papers.report.ablations import Ablations, ablations
from lowmem_cft.papers.report.figures import (
    OtherModel,
    Row,
    StsTable,
    TransferTable,
    other_models,
    sts_table,
    transfer_table,
)
from lowmem_cft.papers.request import find_paper
from lowmem_cft.papers.results import Data, Evaluation, Search, Training

# rows of the table by step, at most
_MOST_STEPS = 25
# models that no paper has
_OTHER_NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct"}


@dataclass(frozen=True)
class Curves:
    """Spearman (-1 to 1) by step and run, on one set."""

    set: str
    points: dict[str, dict[int, float]]

    @property
    def _steps(self) -> list[int]:
        return sorted({step for points in self.points.values() for step in points})

    @property
    def stride(self) -> int:
        """Every so many steps that were scored are in the table."""
        return -(-len(self._steps) // _MOST_STEPS)

    @property
    def steps(self) -> list[int]:
        """The steps in the table: the last one always, and from it backwards."""
        return self._steps[::-1][:: self.stride][::-1]


@dataclass(frozen=True)
class Report:
    """All that the report says; correlations are Spearman x 100, accuracies percent."""

    reproduction: RunRecord
    facts: PaperFacts
    model_name: str
    stages: list[StageRecord[Any]]
    not_run: list[str]
    beyond_not_run: list[str]
    sts: StsTable
    others: list[OtherModel]
    ablations: Ablations
    trainings: dict[str, Training]
    search: Search | None
    published_demonstration: ChosenDemonstration | None
    transfer: TransferTable | None
    data: Data | None
    resamples: list[int]

    @property
    def paper(self) -> Paper:
        return find_paper(self.reproduction.paper)

    @property
    def versions(self) -> str:
        """Versions that the stages were run with; several where they were updated between."""
        stages = [stage.versions for stage in self.stages if stage.versions]
        seen: dict[str, list[str]] = {}
        for versions in stages or [self.reproduction.versions]:
            for name, version in versions.items():
                if version not in seen.setdefault(name, []):
                    seen[name].append(version)
        return ", ".join(f"{name} {' and '.join(each)}" for name, each in seen.items()) or "-"

    @property
    def _rows(self) -> list[tuple[str, Row]]:
        """All rows of tables; with those of transfer tasks stands what they are of."""
        rows = [("", row) for row in (*self.sts.rows, self.sts.mean)]
        transfer = self.transfer
        tasks = [] if transfer is None else [*transfer.rows, transfer.mean]
        return rows + [("transfer", row) for row in tasks]

    @property
    def figures(self) -> list[tuple[str, str, Figure]]:
        """The published figures in the tables, each with its side and its set or task."""
        return [
            (kind or side, row.name, figure)
            for kind, row in self._rows
            for side, figure in row.published.items()
        ]

    @property
    def verified_sources(self) -> dict[str, list[str]]:
        """Where figures that were verified stand, with the sides that they are of."""
        sides: dict[str, list[str]] = {}
        for side, _, figure in self.figures:
            if figure.verified and side not in sides.setdefault(figure.source, []):
                sides[figure.source].append(side)
        return {source: listed for source, listed in sides.items() if listed}

    @property
    def unverified_sources(self) -> list[str]:
        """What is said of figures that were not, those of other models among them."""
        figures = [figure for _, _, figure in self.figures]
        for other in self.others:
            figures += [*other.row.sets.values(), *filter(None, [other.row.mean])]
        return sorted({figure.source for figure in figures if not figure.verified})

    @property
    def any_cut(self) -> bool:
        """Whether a score is not of the protocol's whole set."""
        return any(not score.whole for _, row in self._rows for score in row.ours.values())

    @property
    def curves(self) -> list[Curves]:
        """The scores by step of every training run, by set."""
        by_set: dict[str, dict[str, dict[int, float]]] = {}
        for name, training in self.trainings.items():
            if training.curve is not None and training.curve.points:
                by_set.setdefault(training.curve.set, {})[name] = dict(training.curve.points)
        return [Curves(set_name, points) for set_name, points in by_set.items()]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def dates(self) -> tuple[datetime, datetime] | None:
        """From the first stage's start to the last one's end."""
        if not self.stages:
            return None
        starts = [stage.finished - timedelta(seconds=stage.seconds) for stage in self.stages]
        return min(starts), max(stage.finished for stage in self.stages)


def summarise(records: Records) -> Report:
    """What there is to say, whichever stages were run.

    Raises:
        ValueError: a record is damaged, or of another kind than its name says.
    """
    run = records.run()
    paper = find_paper(run.paper)
    own = paper.own_stages(run.ablation_baseline)
    order = [*own, *paper.beyond]
    done = sorted(
        records.names(), key=lambda name: order.index(name) if name in order else len(order)
    )
    stages = [stage for name in done if (stage := records.get(name)) is not None]
    icl = paper.published(run.model, "icl")
    results = [stage.result for stage in stages]
    return Report(
        run,
        paper.facts,
        paper.facts.models.get(run.model) or _OTHER_NAMES.get(run.model, run.model),
        stages,
        [name for name in own if name not in done],
        [name for name in paper.beyond if name not in done],
        sts_table(records, paper, run.model),
        other_models(paper, run.model),
        ablations(records, paper, run.ablation_baseline),
        {stage.name: stage.result for stage in stages if isinstance(stage.result, Training)},
        records.find(names.SEARCH, Search),
        None if icl is None else icl.demonstration,
        transfer_table(records, paper, run.model),
        records.find(names.DATA, Data),
        sorted({r.bootstrap.resamples for r in results if isinstance(r, Evaluation)}),
    )
