"""The command that repeats a paper's run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lowmem_cft.cli.files import check_writable
from lowmem_cft.cli.options import Offline, Overrides, go_offline, make_screen, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from lowmem_cft.papers.reproduction import Estimate


PaperName = Annotated[str, typer.Argument(help="cft (arXiv 2408.00690) or prompteol (2307.16645).")]
Model = Annotated[str, typer.Option(help="minicpm-2b, opt-1.3b, ...; a wrong one lists them.")]
Out = Annotated[
    Optional[Path], typer.Option(help="Folder of it all; reproductions/PAPER-MODEL if absent.")
]
Hours = Annotated[
    Optional[float],
    typer.Option(help="Fit it all into about so many hours here: fewer steps, less data to score."),
]
Budget = Annotated[
    Optional[str],
    typer.Option(help="Memory, such as 12GiB. Changes time only, and what --hours has room for."),
]
Stages = Annotated[
    Optional[list[str]],
    typer.Option(
        "--stage", help="Do only these; of cft also icl-search, transfer-base and transfer-trained."
    ),
]
Redo = Annotated[
    Optional[list[str]],
    typer.Option(help="Do this stage from its beginning, once; the others stay."),
]
TransferRows = Annotated[
    Optional[int], typer.Option(min=20, help="Cut transfer tasks to so many rows a split.")
]
IclPairs = Annotated[
    Optional[int], typer.Option(min=2, help="Choose demonstrations by so many pairs.")
]
Demonstrations = Annotated[
    Optional[Path], typer.Option(help="File with columns sentence and word.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show stages, FLOPs, time and memory, and stop.")
]


def reproduce(
    paper: PaperName,
    model: Model,
    out: Out = None,
    hours: Hours = None,
    budget: Budget = None,
    stages: Stages = None,
    redo: Redo = None,
    transfer_rows: TransferRows = None,
    icl_pairs: IclPairs = None,
    demonstrations: Demonstrations = None,
    dry_run: DryRun = False,
    overrides: Overrides = None,
    offline: Offline = False,
) -> None:
    """Run a paper stage by stage and report beside its figures; the same command goes on."""
    go_offline(offline)
    from lowmem_cft.papers.reproduction import Reproduction
    from lowmem_cft.papers.request import Request

    request = Request(
        paper,
        model,
        hours,
        budget,
        tuple(overrides or ()),
        transfer_rows,
        icl_pairs,
        None if demonstrations is None else str(demonstrations),
    )
    folder = out or Path("reproductions") / f"{paper}-{model}"
    with make_screen() as screen:
        run = Reproduction(request, folder, stages, offline=offline)
        screen.say(run.share.describe())
        for departure in run.departures():
            screen.say(f"not as published: {departure}")
        if dry_run and (missing := run.missing_data()) is not None:
            screen.say(f"missing: {missing}")
        if not dry_run:
            check_writable(folder, folder=True)
            command = shlex.join(["lowmem-cft", *sys.argv[1:]])
            files = run.run(screen, redo=redo or [], command=command)
    if dry_run:
        print_table(stage_table(run.estimates()))
        return
    for file in files:
        typer.echo(f"written: {file}")


def stage_table(estimates: Sequence[Estimate]) -> Table:
    """Stages with their estimates, and the sum of what is left."""
    from rich.table import Table

    table = Table(title="Stages (estimates)")
    # one column of names, as --stage takes them, and words: both whole in 80 columns
    for column in ("stage", "TFLOP", "hours here", "GiB", ""):
        table.add_column(
            column, justify="left" if column in ("stage", "") else "right", overflow="fold"
        )

    def numbers(flops: float, hours: float, memory_bytes: int) -> list[str]:
        return [f"{flops / 1e12:,.0f}", f"{hours:.2f}", f"{memory_bytes / 2**30:.1f}"]

    for row in estimates:
        flops, memory_bytes = row.effort.flops, row.effort.memory_bytes
        effort = numbers(flops, row.hours, memory_bytes) if memory_bytes else [""] * 3
        name = f"{row.stage.name}\n  {row.stage.what}"
        table.add_row(name, *effort, "done" if row.done else "")
    left = [row for row in estimates if not row.done]
    total = numbers(
        sum(row.effort.flops for row in left),
        sum(row.hours for row in left),
        max((row.effort.memory_bytes for row in left), default=0),
    )
    table.add_row("left", *total, "", style="bold")
    return table
