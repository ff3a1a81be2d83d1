"""Options that several commands take, and what commands print to."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

# typer reads annotations at run time, where Python 3.10's dialect must do.
Overrides = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe value: train.learning_rate=1e-4."
    ),
]


Offline = Annotated[bool, typer.Option("--offline", help="Do not look for anything on the hub.")]


def make_screen() -> Any:
    from rich.console import Console

    from lowmem_cft.cli.progress import Screen
    from lowmem_cft.model.backbone import quiet_libraries

    quiet_libraries()
    return Screen(Console(stderr=True))


def go_offline(offline: bool) -> None:
    if offline:
        import os

        # Read by huggingface_hub and datasets when they are first imported.
        os.environ["HF_HUB_OFFLINE"] = "1"


def print_table(table: Any) -> None:
    from rich.console import Console

    Console().print(table)
