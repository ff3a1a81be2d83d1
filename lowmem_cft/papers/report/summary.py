"""All that the report of a reproduction says, gathered from its records."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from lowmem_cft.papers.published import ChosenDemonstration, PaperFacts, find, paper_facts
from lowmem_cft.papers.report.ablations import Ablations, ablations
from lowmem_cft.papers.report.figures import (
    OtherModel,
    StsTable,
    TransferTable,
    other_models,
    sts_table,
    transfer_table,
)
from lowmem_cft.papers.report.records import (
    Data,
    Evaluation,
    Records,
    Reproduction,
    Search,
    Training,
)

_OTHER_NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct"}
"""Of models that neither paper has."""


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

    reproduction: Reproduction
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
        ValueError: a stage's result is of another kind than its name says.
    """
    asked = records.reproduction
    facts = paper_facts(asked.paper)
    icl = find(asked.paper, asked.model, "icl")
    stages = [
        StageLine(
            one.name,
            one.kind,
            one.what,
            one.inputs_sha256,
            one.seconds,
            one.flops or None,
            one.finished,
            one.versions,
        )
        for one in records.stages.values()
    ]
    return Report(
        asked,
        facts,
        facts.models.get(asked.model) or _OTHER_NAMES.get(asked.model, asked.model),
        stages,
        records.not_run,
        [name for name in asked.stages_beyond if name not in records.stages],
        sts_table(records),
        other_models(records),
        ablations(records),
        records.all(Training),
        records.get("icl-search", Search),
        None if icl is None else icl.demonstration,
        transfer_table(records),
        records.get("data", Data),
        sorted({one.bootstrap.resamples for one in records.all(Evaluation).values()}),
    )
