"""A paper's run in a folder, at full size or cut to a budget of hours.

`reproduction.json` says what was asked for, `stages/` has a record of each stage that is done,
`runs/` the training runs, `evals/` every pair's similarity, `icl/` the search for a demonstration,
`report/` the report, which is written anew after each stage, `unfinished/` the embeddings of an
evaluation in work.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path

import torch

from lowmem_cft.evaluation.transfer.tasks import SPECS
from lowmem_cft.machine import choose_device, library_versions, processor_name
from lowmem_cft.papers import names
from lowmem_cft.papers.paper import Share
from lowmem_cft.papers.paper_stages import PaperStages
from lowmem_cft.papers.records import Records, RunRecord
from lowmem_cft.papers.report.write import write_report
from lowmem_cft.papers.request import Request, departures
from lowmem_cft.papers.results import Kind
from lowmem_cft.papers.stages import Effort, Observer, Stage, run_stages

_HALVINGS = 20
# however few hours there are: rows of a transfer task's split, pairs that choose a demonstration
_LEAST_ROWS, _LEAST_PAIRS = 500, 200


@dataclass(frozen=True)
class Estimate:
    """What a stage takes on this device, and whether it is done."""

    stage: Stage
    effort: Effort
    hours: float
    done: bool


class Reproduction:
    """The stages of a request, in a folder.

    Args:
        folder: new, or begun with the same request.
        selected: names of the stages to do; the paper's own if not given.
        offline: data are looked for on this machine only.

    Raises:
        ValueError: the folder is of another request, there is no such stage, the step does not
            fit, or the hours are too few.
    """

    def __init__(
        self,
        request: Request,
        folder: Path,
        selected: Sequence[str] | None = None,
        *,
        offline: bool = False,
    ) -> None:
        self.request, self.folder = request, folder
        self.records = Records(folder)
        self._begun = self._begun_as()
        self._maker = PaperStages(request, folder, self.records, offline=offline)
        self._chosen = selected
        known = [stage.name for stage in self._maker.make(self._cut(1.0))]
        for name in selected or ():
            if name not in known:
                raise ValueError(f"`stages`: got {name!r}, wanted one of {', '.join(known)}")

    def _begun_as(self) -> RunRecord | None:
        """What the folder was begun as; None while nothing was done that another could spoil."""
        parts = ("runs", "icl", "unfinished")
        started = self.records.names() or any((self.folder / part).exists() for part in parts)
        if not self.records.run_file.is_file() or not started:
            return None
        begun = self.records.run()
        for field in fields(Request):
            then, now = (getattr(asked, field.name) for asked in (begun.request, self.request))
            if field.name != "budget" and then != now:  # memory changes no result
                raise ValueError(
                    f"{self.folder} was begun with {field.name} = {then!r}, now it is {now!r}; "
                    "choose another `out`"
                )
        return begun

    # -- how much of it -------------------------------------------------------------------------

    @cached_property
    def share(self) -> Share:
        """As the folder was begun: rates measured since must not change what is done."""
        request = self.request
        share = self._cut(self._factor()) if self._begun is None else self._begun.share
        return share.model_copy(update={"hours": request.hours, "budget": request.budget})

    def _cut(self, factor: float) -> Share:
        """The whole run times the factor, but for what the user fixed."""
        request = self.request
        rows, pairs = request.transfer_rows, request.icl_pairs
        if rows is None and factor < 1:
            most = max(size for spec in SPECS.values() for size in spec.splits.values())
            rows = max(_LEAST_ROWS, round(factor * most))
        if pairs is None:
            pairs = max(_LEAST_PAIRS, round(factor * names.DEV_PAIRS))
        steps = request.of_paper.ablation_steps
        ablation = (max(1, round(factor * steps)), steps) if steps else None
        return Share(
            training_steps=(max(1, round(factor * request.whole_steps)), request.published_steps),
            ablation_steps=ablation,
            transfer_rows_per_split=rows,
            icl_pairs=(min(pairs, names.DEV_PAIRS), names.DEV_PAIRS),
        )

    def _factor(self) -> float:
        """The share of the run that fits into the hours asked for.

        The paper's own stages count, and those chosen beside them, so that the share does not
        depend on which of them are done first. Scores on the way and least sizes are not cut, so
        it is searched for.
        """
        asked = self.request.hours
        if asked is None or self._taken(1.0) <= asked:
            return 1.0
        low, high = 0.0, 1.0
        if self._taken(low) > asked:
            raise ValueError(
                f"`hours`: got {asked:g}, but with one step of training it is still about "
                f"{self._taken(low):.2g} h on this device, most of it evaluation; give more hours"
            )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._taken(middle) <= asked else (low, middle)
        return low

    def _taken(self, factor: float) -> float:
        """Hours of the run cut by a factor."""
        stages = self._maker.make(self._cut(factor))
        counted = [s for s in stages if self._maker.is_own(s) or s.name in (self._chosen or ())]
        return sum(self._hours(stage) for stage in counted)

    def _hours(self, stage: Stage) -> float:
        rate = self._rates.get(stage.kind, float("inf"))
        return stage.effort().flops / rate / 3600

    @cached_property
    def _rates(self) -> dict[Kind, float]:
        records = [self.records.get(stage.name) for stage in self._maker.make(self._cut(1.0))]
        return self._maker.efforts.rates(record for record in records if record is not None)

    def _selected(self, share: Share) -> list[Stage]:
        stages = self._maker.make(share)
        if self._chosen:
            return [stage for stage in stages if stage.name in self._chosen]
        return [stage for stage in stages if self._maker.is_own(stage)]

    @cached_property
    def stages(self) -> list[Stage]:
        """Those to be done, in their order."""
        return self._selected(self.share)

    # -- doing it -------------------------------------------------------------------------------

    def estimates(self) -> list[Estimate]:
        """What each of the stages takes here."""
        return [
            Estimate(stage, stage.effort(), self._hours(stage), self._is_done(stage))
            for stage in self.stages
        ]

    def departures(self) -> list[str]:
        """Where this run is not the paper's, a sentence each."""
        done = [stage.name for stage in self.stages]
        done += [stage.name for stage in self._maker.make(self.share) if self._is_done(stage)]
        return departures(self.request, self.share, done)

    def missing_data(self) -> str | None:
        """That training data are not here, and what to do, where they are still to be read."""
        todo = [stage for stage in self.stages if stage.kind == "data" and not self._is_done(stage)]
        return self._maker.missing_data() if todo else None

    def _is_done(self, stage: Stage) -> bool:
        return self.records.get(stage.name) is not None

    def run(
        self, observer: Observer, *, redo: Sequence[str] = (), command: str = "from Python"
    ) -> list[Path]:
        """Do the stages left, write the report.

        Args:
            redo: names of stages to do anew, from their beginning; what they left is kept beside.
            command: how this was asked for, for the report.

        Returns:
            The report's files.

        Raises:
            ValueError: the user's mistake, such as data that are not there.
            interrupt.Interrupted: Ctrl-C in training; the same command goes on.
        """
        self.records.write_run(self._record(command))
        report = partial(write_report, self.folder)
        run_stages(self.stages, self.records, observer, redo=redo, done=report)
        return report()

    def _record(self, command: str) -> RunRecord:
        request = self.request
        return RunRecord(
            paper=request.paper,
            model=request.model,
            recipe=request.recipe_name,
            command=command,
            request=request,
            share=self.share,
            ablation_baseline=self._maker.baseline,
            departures=self.departures(),
            machine=_machine(choose_device()),
            versions=library_versions(),
        )


def _machine(device: torch.device) -> dict[str, str]:
    """The machine that the figures are computed on."""
    facts = {
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    return facts
