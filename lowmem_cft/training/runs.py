"""A run's folder is made, continued or replaced, and nothing already written is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowmem_cft.recipe.load import load_recipe, to_yaml
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.run_folder import RunFolder

MAY_CHANGE = ("memory", "eval", "output")
"""Sections that a resumed run may change: they do not define what is trained."""


def open_run(recipe: Recipe, *, resume: bool, overwrite: bool) -> RunFolder:
    """Make, continue or replace the run's folder.

    Raises:
        ValueError: it exists and neither `resume` nor `overwrite` is given; nothing to resume; the
            recipe to resume with differs in what defines the run; or the folder is not writable.
    """
    assert recipe.output.name is not None, "load_recipe names the run"
    run = RunFolder(Path(recipe.output.folder) / recipe.output.name)
    if resume:
        _check_resumable(run, recipe)
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


def _check_resumable(run: RunFolder, recipe: Recipe) -> None:
    replaced = run.checkpoint.with_name("checkpoint.old")
    if replaced.is_dir() and not run.checkpoint.is_dir():
        replaced.rename(run.checkpoint)  # killed between the two renames of a save
    if not run.checkpoint.is_dir():
        raise ValueError(
            f"{run.path} holds no checkpoint to resume: start it anew (with `overwrite` if it exists)"
        )
    old = load_recipe(str(run.recipe))
    for section in type(recipe).model_fields:
        if section in MAY_CHANGE or getattr(old, section) == getattr(recipe, section):
            continue
        then, now = getattr(old, section).model_dump(), getattr(recipe, section).model_dump()
        key = next(key for key in then if then[key] != now[key])
        raise ValueError(
            f"`resume`: {section}.{key} was {then[key]!r} when {run.path} began and is "
            f"{now[key]!r} now; resume with the same values, or start a new run"
        )
