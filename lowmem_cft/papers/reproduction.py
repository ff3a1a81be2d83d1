"""A paper's run in a folder, at full size or cut to a budget of hours.

`reproduction.json` says what was asked for, `stages/` has a record of each stage that is done,
`runs/` the training runs, `evals/` every pair's similarity, `icl/` the search for a demonstration,
`report/` the report, which is written anew after each stage, `unfinished/` the embeddings of an
evaluation in work.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lowmem_cft.evaluation.transfer.tasks import SPECS
from lowmem_cft.files import write_json
from lowmem_cft.machine import choose_device, library_versions
from lowmem_cft.papers.paper_stages import PaperStages
from lowmem_cft.papers.report.write import write_report
from lowmem_cft.papers.request import ABLATION_STEPS, DEV_PAIRS, Request, Share, departures
from lowmem_cft.papers.stages import Kind, Observer, Records, Stage, run_stages

_HALVINGS = 20
_LEAST_ROWS, _LEAST_PAIRS = 500, 200
"""Of a transfer task's split, and of STS-B dev for demonstrations, however few hours there are."""


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
        self._file = folder / "reproduction.json"
        self._before = self._begun()
        self._maker = PaperStages(request, folder, self.records, offline=offline)
        self._chosen = selected
        everything = [stage.name for stage in self._maker.make(self._cut(1.0))]
        for name in selected or ():
            if name not in everything:
                raise ValueError(f"`stages`: got {name!r}, wanted one of {', '.join(everything)}")

    def _begun(self) -> dict[str, Any] | None:
        """What the folder was begun with; None while nothing was done that another could spoil."""
        done = [*self.records.folder.glob("*.json")]
        done += [one for name in ("runs", "icl", "unfinished") for one in self.folder.glob(name)]
        if not self._file.is_file() or not done:
            return None
        try:
            before: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            asked = dict(before["request"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._file}: cannot be read ({error!r}); choose another `out`"
            ) from error
        for key, value in json.loads(json.dumps(asdict(self.request))).items():
            if key != "budget" and asked.get(key) != value:  # memory changes no result
                raise ValueError(
                    f"{self.folder} was begun with {key} = {asked.get(key)!r}, now it is "
                    f"{value!r}; choose another `out`"
                )
        return before

    # -- how much of it -------------------------------------------------------------------------

    @cached_property
    def share(self) -> Share:
        """As the folder was begun: rates measured since must not change what is done."""
        if self._before is None:
            return self._cut(self._factor())
        kept = self._before["share"]
        ablation = kept["ablation_steps"]
        return Share(
            tuple(kept["training_steps"]),
            None if ablation is None else tuple(ablation),
            kept["transfer_rows_per_split"],
            tuple(kept["icl_pairs"]),
        )

    def _cut(self, factor: float) -> Share:
        """The whole run times the factor, but for what the user fixed."""
        request = self.request
        rows, pairs = request.transfer_rows, request.icl_pairs
        if rows is None and factor < 1:
            most = max(size for spec in SPECS.values() for size in spec.splits.values())
            rows = max(_LEAST_ROWS, round(factor * most))
        if pairs is None:
            pairs = max(_LEAST_PAIRS, round(factor * DEV_PAIRS))
        ablation = (max(1, round(factor * ABLATION_STEPS)), ABLATION_STEPS)
        return Share(
            (max(1, round(factor * request.whole_steps)), request.published_steps),
            ablation if request.is_cft else None,
            rows,
            (min(pairs, DEV_PAIRS), DEV_PAIRS),
        )

    def _factor(self) -> float:
        """The share of the run that fits the hours asked for.

        Of the paper's own stages and those chosen beside them, so that it does not hang on which of
        them are done first. Scores on the way and least sizes are not cut, so it is searched for.
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
        return sum(hours for _, hours in self._hours(counted))

    def _hours(self, stages: Sequence[Stage]) -> list[tuple[Stage, float]]:
        rates = self._rates
        return [
            (one, one.effort().flops / rates.get(one.kind, float("inf")) / 3600) for one in stages
        ]

    @cached_property
    def _rates(self) -> dict[Kind, float]:
        found = [self.records.get(stage.name) for stage in self._maker.make(self._cut(1.0))]
        return self._maker.efforts.rates(record for record in found if record is not None)

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

    def estimates(self) -> list[dict[str, Any]]:
        """A row a stage: what it is, TFLOP, hours here, GiB, whether it is done."""
        return [
            {
                "stage": stage.name,
                "what": stage.what,
                "tflop": stage.effort().flops / 1e12,
                "hours": hours,
                "memory_gib": stage.effort().memory_bytes / 2**30,
                "done": self.records.get(stage.name) is not None,
            }
            for stage, hours in self._hours(self.stages)
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

    def run(self, observer: Observer, *, redo: Sequence[str] = ()) -> list[Path]:
        """Do the stages left, write the report.

        Args:
            redo: names of stages to do anew, from their beginning; what they left is kept beside.

        Returns:
            The report's files.

        Raises:
            ValueError: the user's mistake, such as data that are not there.
            interrupt.Interrupted: Ctrl-C in training; the same command goes on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        report = partial(write_report, self.folder)
        run_stages(self.stages, self.records, observer, redo=redo, done=report)
        return report()

    def _write(self) -> None:
        request = self.request
        values = {
            "paper": request.paper,
            "model": request.model,
            "recipe": request.recipe_name,
            "command": shlex.join(["lowmem-cft", *sys.argv[1:]]),
            "request": asdict(request),
            "share": {**asdict(self.share), "hours": request.hours, "budget": request.budget},
            "ablation_baseline": self._maker.baseline if request.is_cft else None,
            "departures": self.departures(),
            "machine": _machine(choose_device()),
            "versions": library_versions(),
        }
        write_json(self._file, values)


def _machine(device: torch.device) -> dict[str, str]:
    """What the figures are computed on."""
    found = {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(terse=True),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
