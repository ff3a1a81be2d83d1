"""Commands that say what there is: doctor, recipes."""

from __future__ import annotations

import typer

from lowmem_cft import __version__
from lowmem_cft.cli.options import print_table


def doctor() -> None:
    """Say what this machine has, what is missing, and how to get it."""
    from rich.table import Table
    from rich.text import Text

    from lowmem_cft.cli.doctor import examine
    from lowmem_cft.model.backbone import quiet_libraries

    quiet_libraries()
    table = Table(title=f"lowmem-cft {__version__}")
    for column in ("", "what", "found, and what to do about it"):
        table.add_column(column, overflow="fold")
    findings = examine()
    for finding in findings:
        remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
        # no markup: a remedy such as pip install lowmem-cft[check] has brackets
        table.add_row(finding.level, finding.what, Text(finding.found + remedy))
    print_table(table)
    if any(finding.level == "missing" for finding in findings):
        raise typer.Exit(1)


def recipes() -> None:
    """List the recipes shipped with the package, and what each is for."""
    from lowmem_cft.recipe.load import preset_description, preset_names

    width = max(map(len, preset_names()))
    for name in preset_names():
        typer.echo(f"{name:{width}}  {preset_description(name)}")
