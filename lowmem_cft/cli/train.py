"""Commands that make a model: train, plan, demo, export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from lowmem_cft.cli.files import check_writable
from lowmem_cft.cli.options import Offline, Overrides, go_offline, make_screen, print_table
from lowmem_cft.files import nearest_names


def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a preset.")],
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run.")] = False,
    new_rate: Annotated[
        bool, typer.Option("--new-rate", help="With --resume: the learning rate may rise.")
    ] = False,
    offline: Offline = False,
) -> None:
    """Fine-tune a model, evaluate it before and after, export it."""
    from lowmem_cft.recipe.load import load_recipe, to_yaml
    from lowmem_cft.training.names import check_names

    resolved = load_recipe(recipe, overrides or [])
    if print_config:
        typer.echo(to_yaml(resolved), nl=False)
        return
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: choose one")
    check_names(resolved)
    go_offline(offline)
    from lowmem_cft.cli.tables import before_after_table
    from lowmem_cft.training.pipeline import run_recipe

    with make_screen() as screen:
        folder, metrics = run_recipe(
            resolved,
            screen,
            resume=resume,
            overwrite=overwrite,
            new_rate=new_rate,
            offline=offline,
        )
    if metrics.after:
        print_table(before_after_table(metrics.before, metrics.after))
    typer.echo(f"run: {folder.path}")


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a preset.")],
    memory: Annotated[
        Optional[str],
        typer.Option(
            help="Limit of it all, such as 12GiB; a graphics card's unless --device says."
        ),
    ] = None,
    device: Annotated[
        Optional[str], typer.Option(help="cuda or cpu; need not be on this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    overrides: Overrides = None,
) -> None:
    """Predict memory and cost of a recipe's steps, from the model's configuration alone.

    For model.id a folder with only a config.json is enough; models of presets need nothing.
    """
    from lowmem_cft.model.names import check_model_name
    from lowmem_cft.recipe.load import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    check_model_name(resolved.model.id)
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device: got {device}, wanted cuda or cpu")
    from lowmem_cft.cli.tables import plan_tables
    from lowmem_cft.planning.limits import plan_limit
    from lowmem_cft.planning.recipe_plan import plan_recipe

    with make_screen() as screen:
        device_type, limit = plan_limit(resolved, memory, device)
        recipe_plan = plan_recipe(resolved, device_type, limit)
        for note in recipe_plan.notes:
            screen.say(note)
    if as_json:
        typer.echo(json.dumps(recipe_plan.to_json()))
        return
    for table in plan_tables(recipe_plan):
        print_table(table)
    typer.echo(recipe_plan.prediction.plan.describe())


def demo(overrides: Overrides = None, offline: Offline = False) -> None:
    """Train the embedded small model on the data at hand; ends in one line of JSON."""
    go_offline(offline)
    from lowmem_cft.cli.tables import before_after_table
    from lowmem_cft.training.demo import run_demo

    with make_screen() as screen:
        metrics, summary = run_demo(screen, offline=offline, overrides=overrides or [])
    print_table(before_after_table(metrics.before, metrics.after))
    typer.echo(json.dumps(asdict(summary)))


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder to write; RUN/model if absent.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge the adapter into 16-bit weights.")
    ] = False,
) -> None:
    """Write a finished run as a folder that SentenceTransformer(path) loads, and check it."""
    if not (run / "recipe.yaml").is_file():
        raise ValueError(
            f"{run} is no run folder (no recipe.yaml in it)"
            if run.exists()
            else f"{run} does not exist; {nearest_names(run)}"
        )
    from lowmem_cft.exporting.finished import check_target, export_run
    from lowmem_cft.machine import choose_device

    target = out or run / "model"
    check_target(target)
    check_writable(target, folder=True)
    with make_screen() as screen:
        export_run(run, target, "merged" if merged else "adapter", choose_device(), screen)
    typer.echo(str(target))
