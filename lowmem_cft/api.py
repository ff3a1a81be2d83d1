"""The program's jobs as functions, each what a command does.

What a command takes as an option these take by keyword, and all of it has a default. They print
nothing: whoever wants to hear how work goes passes an observer (`training.trainer.Observer` for
training, a function for the others).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from lowmem_cft.data.rows import TrainRow
from lowmem_cft.evaluation import suites
from lowmem_cft.exporting.finished import export_run
from lowmem_cft.inference.embedder import Embeds, load_embedder
from lowmem_cft.machine import choose_device
from lowmem_cft.planning.limits import plan_limit
from lowmem_cft.planning.recipe_plan import RecipePlan, plan_recipe
from lowmem_cft.progress import Quiet, Say
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.pipeline import run_recipe
from lowmem_cft.training.records import Metrics, read_metrics
from lowmem_cft.training.trainer import Observer


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    metrics: Metrics

    @property
    def model_path(self) -> Path | None:
        """The exported model that SentenceTransformer(path) loads; None where none was exported."""
        path = RunFolder(self.folder).model
        return path if path.is_dir() else None


def _recipe(recipe: Recipe | str) -> Recipe:
    return load_recipe(recipe) if isinstance(recipe, str) else recipe


def _device(device: str | None) -> torch.device:
    return choose_device() if device is None else torch.device(device)


def _unheard(text: str) -> None:
    """Nobody listens."""


def train(
    recipe: Recipe | str,
    *,
    rows: Sequence[TrainRow] | None = None,
    progress: Observer | None = None,
    resume: bool = False,
    overwrite: bool = False,
    new_rate: bool = False,
    device: str | None = None,
    offline: bool = False,
) -> Run:
    """Fine-tune a model, score it before and after, export it.

    Args:
        recipe: a recipe, its file, or a preset's name.
        rows: trained on in the place of the recipe's data sources. A run of them is resumed with
            the same ones.
        progress: is told what happens, step by step.
        resume: go on from the run's checkpoint, to another number of steps if the recipe says so.
        new_rate: a resumed run may go on at a higher learning rate than it would have had.
        overwrite: replace the run of that name.
        device: such as cuda:0; the GPU where there is one.
        offline: look for nothing on the hub.

    Raises:
        ValueError: a mistake in recipe, data, model or folder.
        training.interrupt.Interrupted: Ctrl-C; what was reached is saved.
        RuntimeError: memory or disk is full, or the loss is no number.
    """
    folder, metrics = run_recipe(
        _recipe(recipe),
        progress or Quiet(),
        rows=rows,
        resume=resume,
        overwrite=overwrite,
        new_rate=new_rate,
        device=_device(device),
        offline=offline,
    )
    return Run(folder.path, metrics)


def load(
    name: str | PathLike[str],
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    float32: bool = False,
    device: str | None = None,
    progress: Say = _unheard,
) -> Embeds:
    """Load a run, an exported model, a sentence-transformers folder, or a base model, to embed with.

    Args:
        recipe: for a base model, the recipe that says how to embed.
        overrides: for a base model, values of a recipe such as `embedding.pooling=mean`.
        float32: compute in float32 from the weights as stored.

    Raises:
        ValueError: nothing of that name, or a recipe for a model that says itself how it embeds.
    """
    return load_embedder(
        str(name),
        _device(device),
        progress,
        recipe_name=recipe,
        overrides=overrides,
        float32=float32,
    )


def evaluate(
    model: str | PathLike[str] | Embeds,
    *,
    suite: Literal["sts", "transfer"] | None = None,
    protocol: str | None = None,
    sets: Sequence[str] = (),
    clean_up: bool = False,
    float32: bool = False,
    resamples: int | None = None,
    limit: int | None = None,
    solver: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    offline: bool = False,
    device: str | None = None,
    progress: Say = _unheard,
) -> suites.Report:
    """Score a model on STS sets, with intervals, or on transfer tasks.

    Args:
        model: a name as `load` takes it, or a model that it gave.
        suite: sts takes all sets of the protocol, transfer all tasks; None the STS sets that are
            on this machine.
        protocol: mteb or senteval, for STS.
        sets: names of STS sets, files of pairs, or transfer tasks, in the place of all.
        clean_up: the text clean-up of PromptEOL's protocol.
        float32, recipe, overrides: as in `load`, for a model that is named.
        resamples, limit, solver: as the options of `lowmem-cft eval`.

    Raises:
        ValueError: options that do not go together; data missing or wrong; no such model.
    """
    embedder = None if isinstance(model, (str, PathLike)) else model
    if embedder is not None and (recipe is not None or overrides or float32):
        raise ValueError(
            "`recipe`, `overrides` and `float32` say how a model is loaded, and this one is: give "
            "them to load(), or evaluate its name"
        )
    options = suites.Options(
        str(model) if embedder is None else "a loaded model",
        suite,
        protocol,
        sets,
        clean_up=clean_up,
        float32=float32 if embedder is None else embedder.float32,
        resamples=resamples,
        limit=limit,
        solver=solver,
        recipe=recipe,
        overrides=overrides,
        offline=offline,
        device=_device(device),
        embedder=embedder,
    )
    return suites.prepare(options)(progress, lambda report: None)


def plan(
    recipe: Recipe | str, *, memory: str | None = None, device: Literal["cuda", "cpu"] | None = None
) -> RecipePlan:
    """Predict memory and cost of a recipe's steps, from the model's configuration alone.

    Args:
        memory: limit of it all, such as 12GiB; the recipe's if None, or what is free here.
        device: need not be on this machine.

    Raises:
        ValueError: no plan fits, or the model is unknown.
    """
    recipe = _recipe(recipe)
    return plan_recipe(recipe, *plan_limit(recipe, memory, device))


def export(
    run: Run | str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    kind: Literal["adapter", "merged"] = "adapter",
    device: str | None = None,
    progress: Say = _unheard,
) -> Path:
    """Write a finished run as a folder that SentenceTransformer(path) loads, and check it.

    Args:
        out: the folder to write; `model` in the run's if None.
        kind: the adapter on its base, or both merged in 16 bits.

    Raises:
        ValueError: no finished run, or `out` is a folder of something else.
        RuntimeError: the export does not embed as the run's model.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    target = RunFolder(folder).model if out is None else Path(out)
    export_run(folder, target, kind, _device(device), Quiet(progress))
    return target


def open_run(folder: str | PathLike[str]) -> Run:
    """A run that is finished, from its folder.

    Raises:
        ValueError: it is not, or its metrics are damaged.
    """
    return Run(Path(folder), read_metrics(RunFolder(Path(folder))))
