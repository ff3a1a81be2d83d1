"""What `lowmem-cft eval` does: which options go together, data first, then the model, a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lowmem_cft.evaluation.sts import bootstrap
from lowmem_cft.evaluation.sts import mteb_results as task_result
from lowmem_cft.evaluation.sts import protocols as sts
from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts import score as evaluate
from lowmem_cft.evaluation.sts import sets as sts_data
from lowmem_cft.evaluation.sts.correlation import Floats
from lowmem_cft.evaluation.transfer import report as transfer_report
from lowmem_cft.evaluation.transfer import score as transfer
from lowmem_cft.evaluation.transfer import tasks as transfer_data
from lowmem_cft.inference.embed import Embed
from lowmem_cft.inference.embedder import Embeds, load_embedder, normalized_or_not
from lowmem_cft.machine import choose_device
from lowmem_cft.progress import Say

Report = eval_report.Report | transfer_report.TransferReport
Keep = Callable[[Report], None]
Place = Callable[[Report], Path | None]
"""Where a report is to lie, if it is to be written."""
Score = Callable[[Say, Keep], Report]
"""Loads the model and scores it; what is scored is told, and kept after each set but the last."""


@dataclass(frozen=True)
class Options:
    """The command's options; None and empty stand for those not given."""

    model: str
    suite: str | None = None
    protocol: str | None = None
    names: Sequence[str] = ()
    clean_up: bool = False
    mteb_out: Path | None = None
    float32: bool = False
    resamples: int | None = None
    limit: int | None = None
    solver: str | None = None
    recipe: str | None = None
    overrides: Sequence[str] = ()
    offline: bool = False
    device: torch.device | None = None
    embedder: Embeds | None = None
    """A model that is loaded; `model` is its name in the report then."""


def prepare(options: Options) -> Score:
    """Read the data; the result loads the model and scores it.

    Raises:
        ValueError: options that make no sense, also together; data missing or wrong.
    """
    _check_together(options)
    return _prepare_transfer(options) if options.suite == "transfer" else _prepare_sts(options)


def write(found: Report, out: Path) -> None:
    """Write the report as JSON, one of STS with its pairs beside it."""
    if isinstance(found, eval_report.Report):
        eval_report.write(found, out)
    else:
        transfer_report.write(found, out)


def score_and_write(score: Score, place_of: Place, say: Say) -> Report:
    """Score, and write the report where `place_of` says.

    Until it is whole, the report so far lies in a file of its own beside that place, so that what
    stops early loses one set at most.
    """
    unfinished: Path | None = None

    def keep(found: Report) -> None:
        nonlocal unfinished
        if (place := place_of(found)) is not None:
            before, unfinished = unfinished, place.with_name(f"unfinished-{place.name}")
            write(found, unfinished)
            if before != unfinished:
                _remove(before)

    try:
        found = score(say, keep)
        if (place := place_of(found)) is not None:
            write(found, place)
    except BaseException:  # Ctrl-C too
        if unfinished is not None:
            say(f"what was scored before it stopped is in {unfinished}")
        raise
    _remove(unfinished)
    return found


def _remove(report: Path | None) -> None:
    if report is not None:
        report.unlink(missing_ok=True)
        eval_report.pairs_file(report).unlink(missing_ok=True)  # one of transfer tasks has none


def _check_together(options: Options) -> None:
    if options.suite not in (None, "sts", "transfer"):
        raise ValueError(f"`suite`: got {options.suite!r}, wanted sts or transfer")
    of_sts = {
        "protocol": options.protocol,
        "resamples": options.resamples,
        "mteb_out": options.mteb_out,
    }
    of_transfer = {"limit": options.limit, "solver": options.solver}
    wrong, suite = (of_sts, "sts") if options.suite == "transfer" else (of_transfer, "transfer")
    for name, value in wrong.items():
        if value is not None:
            raise ValueError(
                f"`{name}` belongs to `suite` {suite}; leave it out, or take that suite"
            )


def _load(options: Options, say: Say, normalize: bool | None) -> Embed:
    if options.embedder is not None:
        return normalized_or_not(options.embedder, normalize)
    return load_embedder(
        options.model,
        options.device or choose_device(),
        say,
        recipe_name=options.recipe,
        overrides=options.overrides,
        float32=options.float32,
        normalize=normalize,
    ).embed


def _prepare_sts(options: Options) -> Score:
    protocol = None
    if options.suite or options.protocol:
        protocol = sts.protocol_named(options.protocol or "mteb")
    if options.mteb_out is not None:
        task_result.check_expressible(protocol, options.clean_up)
    names = list(options.names) or None
    sets = sts_data.load_sets(protocol, names, offline=options.offline, cleaned_up=options.clean_up)
    if options.mteb_out is not None:
        task_result.check_own_text(sets)
    return partial(_score_sts, options, protocol, sets)


def _score_sts(
    options: Options,
    protocol: sts.Protocol | None,
    sets: Sequence[sts_data.LoadedSet],
    say: Say,
    keep: Keep,
) -> eval_report.Report:
    embed = _load(options, say, None)
    scored: list[evaluate.ScoredSet] = []
    drawn: dict[str, Floats] = {}
    for one in sets:
        scored.append(evaluate.score_pairs(embed, one))
        say(f"{one.name}: {100 * scored[-1].score.spearman:.2f}")
        found = eval_report.report(
            options.model,
            scored,
            protocol=protocol,
            cleaned_up=options.clean_up,
            float32=options.float32,
            num_resamples=options.resamples or bootstrap.RESAMPLES,
            drawn=drawn,
        )
        if one is not sets[-1]:
            keep(found)
    return found


def _prepare_transfer(options: Options) -> Score:
    known = {settings.solver: settings for settings in (transfer.SENTEVAL, transfer.CONVERGED)}
    settings = transfer.SENTEVAL
    if options.solver is not None:
        found = [known[solver] for solver in known if solver == options.solver]
        if not found:
            raise ValueError(f"`solver`: got {options.solver!r}, wanted one of {', '.join(known)}")
        (settings,) = found
    tasks = transfer_data.load_tasks(
        sts_data.data_folder(), list(options.names or transfer_data.SPECS), limit=options.limit
    )
    for task in tasks:
        transfer.check_task(task, settings)
    return partial(_score_transfer, options, settings, tasks)


def _score_transfer(
    options: Options,
    settings: transfer.TransferSettings,
    tasks: Sequence[transfer_data.TransferTask],
    say: Say,
    keep: Keep,
) -> transfer_report.TransferReport:
    return transfer_report.score_tasks(
        tasks,
        _load(options, say, False),
        model=options.model,
        settings=settings,
        device=options.device or choose_device(),
        cleaned_up=options.clean_up,
        float32=options.float32,
        say=say,
        keep=keep,
    )
