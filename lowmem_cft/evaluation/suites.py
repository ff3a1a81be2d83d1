"""What a model can be scored on: STS sets or transfer tasks, read and checked before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lowmem_cft.evaluation.sts import bootstrap, mteb_results, protocols
from lowmem_cft.evaluation.sts.correlation import Floats
from lowmem_cft.evaluation.sts.report import StsReport, report
from lowmem_cft.evaluation.sts.score import ScoredSet, score_pairs
from lowmem_cft.evaluation.sts.sets import LoadedSet, data_folder, load_sets
from lowmem_cft.evaluation.transfer import tasks as transfer_tasks
from lowmem_cft.evaluation.transfer.report import TransferReport, partial_reports
from lowmem_cft.evaluation.transfer.score import (
    CONVERGED,
    SENTEVAL,
    TransferSettings,
    check_task,
)
from lowmem_cft.inference.embedder import Embeds, normalized_or_not
from lowmem_cft.machine import choose_device
from lowmem_cft.progress import Say

Report = StsReport | TransferReport


@dataclass(frozen=True)
class StsSuite:
    """STS sets of a protocol or of none, as they are embedded, and how often they are resampled."""

    sets: Sequence[LoadedSet]
    protocol: protocols.Protocol | None = None
    cleaned_up: bool = False
    num_resamples: int = bootstrap.RESAMPLES

    normalize: ClassVar[bool | None] = None
    """Vectors are taken as the model gives them: a cosine does not depend on their length."""

    def score(self, model: Embeds, name: str, say: Say) -> Iterator[StsReport]:
        """The report so far after each set; the last one is whole.

        Args:
            name: of the model, for the report.
            say: told each set's score.

        Raises:
            ValueError: as in `score_pairs`.
        """
        scored: list[ScoredSet] = []
        drawn: dict[str, Floats] = {}
        for loaded in self.sets:
            scored.append(score_pairs(model.embed, loaded))
            say(f"{loaded.name}: {100 * scored[-1].score.spearman:.2f}")
            yield report(
                name,
                scored,
                protocol=self.protocol,
                cleaned_up=self.cleaned_up,
                float32=model.float32,
                num_resamples=self.num_resamples,
                drawn=drawn,
            )


@dataclass(frozen=True)
class TransferSuite:
    """Transfer tasks, how their classifiers are trained, and on which device."""

    tasks: Sequence[transfer_tasks.TransferTask]
    settings: TransferSettings
    cleaned_up: bool
    device: torch.device

    normalize: ClassVar[bool | None] = False
    """The protocol classifies raw embeddings."""

    def score(self, model: Embeds, name: str, say: Say) -> Iterator[TransferReport]:
        """The report so far after each task; the last one is whole.

        Args:
            name: of the model, for the report.
            say: told each task's size, then its accuracy.

        Raises:
            ValueError: as in `transfer.score.score_task`.
        """
        return partial_reports(
            self.tasks,
            normalized_or_not(model, self.normalize),
            model=name,
            settings=self.settings,
            device=self.device,
            cleaned_up=self.cleaned_up,
            float32=model.float32,
            say=say,
        )


Suite = StsSuite | TransferSuite


def read_suite(
    suite: str | None,
    names: Sequence[str] = (),
    *,
    clean_up: bool = False,
    protocol: str | None = None,
    resamples: int | None = None,
    mteb_out: Path | None = None,
    limit: int | None = None,
    solver: str | None = None,
    offline: bool = False,
    device: torch.device | None = None,
) -> Suite:
    """Read what a model is to be scored on.

    Args:
        suite: sts takes all sets of the protocol, transfer all tasks; None the STS sets that are
            on this machine.
        names: of STS sets, files of pairs, or transfer tasks, in the place of all.
        protocol, resamples: of STS. `mteb_out`, where mteb's files will be written, is checked here.
        limit, solver: of transfer tasks.
        device: where classifiers are trained; the GPU where there is one.

    Raises:
        ValueError: arguments that make no sense, also together; data missing or wrong.
    """
    if suite not in (None, "sts", "transfer"):
        raise ValueError(f"`suite`: got {suite!r}, wanted sts or transfer")
    if suite == "transfer":
        given = {"protocol": protocol, "resamples": resamples, "mteb_out": mteb_out}
        _refuse(given, "sts")
        return _read_tasks(names, clean_up, limit, solver, device or choose_device())
    _refuse({"limit": limit, "solver": solver}, "transfer")
    if suite is not None and protocol is None:
        protocol = "mteb"
    known = None if protocol is None else protocols.protocol_named(protocol)
    if mteb_out is not None:
        mteb_results.check_expressible(known, clean_up)
    sets = load_sets(known, list(names) or None, offline=offline, cleaned_up=clean_up)
    if mteb_out is not None:
        mteb_results.check_own_text(sets)
    return StsSuite(sets, known, clean_up, resamples or bootstrap.RESAMPLES)


def _refuse(arguments: Mapping[str, object], suite: str) -> None:
    """Raise ValueError where an argument of the other suite is given."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` belongs to `suite` {suite}; leave it out, or take that suite"
            )


def _read_tasks(
    names: Sequence[str],
    cleaned_up: bool,
    limit: int | None,
    solver: str | None,
    device: torch.device,
) -> TransferSuite:
    solvers: dict[str, TransferSettings] = {s.solver: s for s in (SENTEVAL, CONVERGED)}
    settings = SENTEVAL if solver is None else solvers.get(solver)
    if settings is None:
        raise ValueError(f"`solver`: got {solver!r}, wanted one of {', '.join(solvers)}")
    tasks = transfer_tasks.load_tasks(
        data_folder(), list(names or transfer_tasks.SPECS), limit=limit
    )
    for task in tasks:
        check_task(task, settings)
    return TransferSuite(tasks, settings, cleaned_up, device)
