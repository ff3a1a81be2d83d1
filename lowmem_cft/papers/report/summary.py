"""All that the report of a reproduction says, gathered from its records."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from lowmem_cft.papers.paper import DATA, SEARCH, Paper, PaperFacts
from lowmem_cft.papers.published import ChosenDemonstration
from lowmem_cft.papers.records import Records, RunRecord, StageRecord
from lowmem_cft.papers.report.ablations import Ablations, ablations
from lowmem_cft.papers.report.figures import (
    OtherModel,
    StsTable,
    TransferTable,
    other_models,
    sts_table,
    transfer_table,
)
from lowmem_cft.papers.request import find_paper
from lowmem_cft.papers.results import Data, Evaluation, Search, Training

# models that no paper has
_OTHER_NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct"}


@dataclass(frozen=True)
class StageLine:
    """A stage that was run, without its result."""

    name: str
    kind: str
    what: str
    inputs_sha256: str
    seconds: float
    flops: float | None
    finished: datetime
    versions: dict[str, str]


@dataclass(frozen=True)
class Report:
    """All that the report says; correlations are Spearman x 100, accuracies percent."""

    reproduction: RunRecord
    facts: PaperFacts
    model_name: str
    stages: list[StageLine]
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
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def dates(self) -> tuple[datetime, datetime] | None:
        """From the first stage's start to the last one's end."""
        if not self.stages:
            return None
        first = min(one.finished - timedelta(seconds=one.seconds) for one in self.stages)
        return first, max(one.finished for one in self.stages)


def summarise(records: Records) -> Report:
    """What there is to say, whichever stages were run.

    Raises:
        ValueError: a record is damaged, or of another kind than its name says.
    """
    run = records.run()
    paper = find_paper(run.paper)
    own = paper.own_stages(run.ablation_baseline)
    order = [*own, *paper.beyond]
    names = records.names()
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    stages = [stage for name in names if (stage := records.get(name)) is not None]
    icl = paper.published(run.model, "icl")
    results = [stage.result for stage in stages]
    return Report(
        run,
        paper.facts,
        paper.facts.models.get(run.model) or _OTHER_NAMES.get(run.model, run.model),
        [_line(stage) for stage in stages],
        [name for name in own if name not in names],
        [name for name in paper.beyond if name not in names],
        sts_table(records, paper, run.model),
        other_models(paper, run.model),
        ablations(records, paper, run.ablation_baseline),
        {stage.name: stage.result for stage in stages if isinstance(stage.result, Training)},
        records.find(SEARCH, Search),
        None if icl is None else icl.demonstration,
        transfer_table(records, paper, run.model),
        records.find(DATA, Data),
        sorted({r.bootstrap.resamples for r in results if isinstance(r, Evaluation)}),
    )


def _line(stage: StageRecord[Any]) -> StageLine:
    return StageLine(
        stage.name,
        stage.kind,
        stage.what,
        stage.inputs_sha256,
        stage.seconds,
        stage.flops or None,
        stage.finished,
        stage.versions,
    )
