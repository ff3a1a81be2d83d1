"""A run's folder is made, continued or replaced, and nothing already written is lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowmem_cft.files import whole_file
from lowmem_cft.recipe.load import load_saved, to_yaml
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.run_folder import RunFolder

MAY_CHANGE = (
    "memory.",
    "eval.",
    "output.",
    "train.steps",
    "train.epochs",
    "train.save_",
    "loss.on_no_negatives",
)
"""Beginnings of the keys that a resumed run may change: none of them defines what a step does."""

RATE_KEYS = ("train.learning_rate", "train.schedule", "train.warmup_steps")
"""What it may change besides where it is allowed another learning rate."""


def open_run(recipe: Recipe, *, resume: bool, overwrite: bool, new_rate: bool = False) -> RunFolder:
    """Make, continue or replace the run's folder.

    Args:
        new_rate: a run that is continued may have another learning rate.

    Raises:
        ValueError: it exists and neither `resume` nor `overwrite` is given; nothing to resume; the
            recipe to resume with differs in what defines the run; or the folder is not writable.
    """
    assert recipe.output.name is not None, "load_recipe names the run"
    run = RunFolder(Path(recipe.output.folder) / recipe.output.name)
    if resume:
        _check_resumable(run, recipe, new_rate=new_rate)
        return run
    if run.path.exists() and not overwrite:
        raise ValueError(
            f"{run.path} exists: go on with `resume`, replace it with `overwrite`, or choose "
            "another name with `overrides` output.name=NAME"
        )
    try:
        if run.path.exists():
            if not run.recipe.is_file() and any(run.path.iterdir()):
                raise ValueError(f"{run.path} is no run of ours, so `overwrite` does not touch it")
            shutil.rmtree(run.replaced, ignore_errors=True)
            run.path.rename(run.replaced)
        run.path.mkdir(parents=True)
        run.recipe.write_text(to_yaml(recipe), encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot write to {run.path} ({error.strerror}); choose another place with "
            "`overrides` output.folder=FOLDER"
        ) from error
    return run


def keep_recipe(run: RunFolder, recipe: Recipe) -> None:
    """Have the folder of a continued run say with which recipe it goes on."""
    with whole_file(run.recipe) as unfinished:
        unfinished.write_text(to_yaml(recipe), encoding="utf-8")


def _check_resumable(run: RunFolder, recipe: Recipe, *, new_rate: bool) -> None:
    replaced = run.checkpoint.with_name("checkpoint.old")
    if replaced.is_dir() and not run.checkpoint.is_dir():
        replaced.rename(run.checkpoint)  # killed between the two renames of a save
    if not run.checkpoint.is_dir():
        raise ValueError(
            f"{run.path} holds no checkpoint to resume: start it anew (with `overwrite` if it exists)"
        )
    then, now = _values(load_saved(run.recipe)), _values(recipe)
    may_change = MAY_CHANGE + (RATE_KEYS if new_rate else ())
    changed = [
        key
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key) and not key.startswith(may_change)
    ]
    if not changed:
        return
    listed = "; ".join(
        f"{key} was {then.get(key)!r} and is {now.get(key)!r} now" for key in changed
    )
    rate = " (another learning rate: `new_rate`)" if set(changed) <= set(RATE_KEYS) else ""
    raise ValueError(
        f"`resume`: {run.path} began with another recipe: {listed}; resume with the same values"
        f"{rate}, or start a new run"
    )


def _values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values by dotted key, elements of lists by their number."""
    values: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        items: Iterable[tuple[Any, Any]]
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (list, tuple)):
            items = enumerate(value)
        else:
            values[key] = value
            return
        for name, item in items:
            add(f"{key}.{name}" if key else str(name), item)

    add("", recipe.model_dump())
    return values
