"""The command that repeats a paper's run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lowmem_cft.cli.files import check_writable
from lowmem_cft.cli.options import Offline, Overrides, go_offline, make_screen, print_table


def reproduce(
    paper: Annotated[str, typer.Argument(help="cft (arXiv 2408.00690) or prompteol (2307.16645).")],
    model: Annotated[str, typer.Option(help="minicpm-2b, opt-1.3b, ...; a wrong one lists them.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder of it all; reproductions/PAPER-MODEL if absent.")
    ] = None,
    hours: Annotated[
        Optional[float],
        typer.Option(
            help="Fit it all into about so many hours here: fewer steps, less data to score."
        ),
    ] = None,
    budget: Annotated[
        Optional[str],
        typer.Option(
            help="Memory, such as 12GiB. Changes time only, and what --hours has room for."
        ),
    ] = None,
    stages: Annotated[
        Optional[list[str]],
        typer.Option(
            "--stage",
            help="Do only these; of cft also icl-search, transfer-base and transfer-trained.",
        ),
    ] = None,
    redo: Annotated[
        Optional[list[str]],
        typer.Option(help="Do this stage from its beginning, once; the others stay."),
    ] = None,
    transfer_rows: Annotated[
        Optional[int], typer.Option(min=20, help="Cut transfer tasks to so many rows a split.")
    ] = None,
    icl_pairs: Annotated[
        Optional[int], typer.Option(min=2, help="Choose demonstrations by so many pairs.")
    ] = None,
    demonstrations: Annotated[
        Optional[Path], typer.Option(help="File with columns sentence and word.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show stages, FLOPs, time and memory, and stop.")
    ] = False,
    overrides: Overrides = None,
    offline: Offline = False,
) -> None:
    """Run a paper stage by stage and report beside its figures; the same command goes on."""
    go_offline(offline)
    from lowmem_cft.cli.tables import stage_table
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
        asked = Reproduction(request, folder, stages, offline=offline)
        screen.say(asked.share.describe())
        for departure in asked.departures():
            screen.say(f"not as published: {departure}")
        if dry_run and (missing := asked.missing_data()) is not None:
            screen.say(f"missing: {missing}")
        if not dry_run:
            check_writable(folder, folder=True)
            report = asked.run(screen, redo=redo or [])
    if dry_run:
        print_table(stage_table(asked.estimates()))
        return
    for file in report:
        typer.echo(f"written: {file}")
