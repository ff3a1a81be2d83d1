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
from lowmem_cft.evaluation.search.demonstrations import SHIPPED, read_demonstrations
from lowmem_cft.evaluation.search.search import SearchResult, load_searched
from lowmem_cft.evaluation.sts.bootstrap import RESAMPLES
from lowmem_cft.evaluation.sts.compare import Comparison
from lowmem_cft.evaluation.sts.compare import compare as compare_reports
from lowmem_cft.evaluation.sts.sets import data_folder, load_set
from lowmem_cft.evaluation.suites import Report, read_suite
from lowmem_cft.exporting.finished import export_run
from lowmem_cft.inference.embedder import Embeds, load_embedder
from lowmem_cft.machine import choose_device
from lowmem_cft.planning.limits import plan_limit
from lowmem_cft.planning.recipe_plan import RecipePlan, plan_recipe
from lowmem_cft.progress import Quiet, Say
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.card import write_export_card
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
    """Load a run, an exported model, a sentence-transformers model, or a base model, to embed with.

    `.embed(texts)` gives float32 (texts, D); `.embed(texts, role="document")` embeds them as what is
    searched, which differs where the model has another template for it.

    Args:
        name: a folder or hub id.
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
) -> Report:
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

    Returns:
        The report: `.mean`, `.scores`, and `.write("scores.json")` for `compare`.

    Raises:
        ValueError: options that do not go together; data missing or wrong; no such model.
    """
    is_loaded = not isinstance(model, (str, PathLike))
    if is_loaded and (recipe is not None or overrides or float32):
        raise ValueError(
            "`recipe`, `overrides` and `float32` say how a model is loaded, and this one is: give "
            "them to load(), or evaluate its name"
        )
    loaded_suite = read_suite(
        suite,
        sets,
        clean_up=clean_up,
        protocol=protocol,
        resamples=resamples,
        limit=limit,
        solver=solver,
        offline=offline,
        device=_device(device),
    )
    name = "a loaded model"
    if isinstance(model, (str, PathLike)):
        name = str(model)
        model = load_embedder(
            name,
            _device(device),
            progress,
            recipe_name=recipe,
            overrides=overrides,
            float32=float32,
            normalize=loaded_suite.normalize,
        )
    *_, report = loaded_suite.score(model, name, progress)
    return report


def compare(
    a: str | PathLike[str], b: str | PathLike[str], *, resamples: int = RESAMPLES
) -> Comparison:
    """Compare two evaluated models: the paired difference of their STS scores, B less A.

    Args:
        a, b: a run's folder, or a file that a report wrote.
        resamples: how often the pairs are drawn for the intervals.

    Returns:
        The comparison: `.mean` and `.sets`, each with `.a`, `.b`, `.difference` and `.interval`;
        `.write("compared.json")` writes it.

    Raises:
        ValueError: a report is missing or damaged, or the two are not of the same pairs.
    """
    return compare_reports(Path(a), Path(b), resamples)


def search_demonstrations(
    model: str | PathLike[str],
    *,
    demonstrations: str | PathLike[str] = SHIPPED,
    template: str | None = None,
    set_name: str = "STSBenchmark-dev",
    limit: int | None = None,
    clean_up: bool = False,
    out: str | PathLike[str] | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    offline: bool = False,
    device: str | None = None,
    progress: Say = _unheard,
) -> SearchResult:
    """Find the demonstration that helps most; the same call goes on where one was stopped.

    Args:
        model: a run's folder, an exported model, or a base model.
        demonstrations: a file with columns sentence and word; the 72 shipped if absent.
        template: what demonstrations are put before; the model's own if None, else PromptEOL's.
        set_name: an STS set, a file of pairs, or demo for the embedded pairs.
        limit: score on this many of its pairs, always the same ones.
        clean_up: the text clean-up of PromptEOL's protocol.
        out: the folder that keeps every trial; icl/MODEL if None.
        recipe, overrides: as in `load`.

    Returns:
        The result: `.trials`, the best first, `.best`, its `.template`, and the `.recipe` that
        embeds so.

    Raises:
        ValueError: data or model are missing or wrong, or the folder is of another search.
    """
    listed = read_demonstrations(Path(demonstrations))
    scored_set = load_set(set_name, data_folder(), limit, offline=offline, cleaned_up=clean_up)
    searched = load_searched(
        str(model), template, _device(device), progress, recipe_name=recipe, overrides=overrides
    )
    folder = Path("icl") / Path(model).name if out is None else Path(out)
    return searched.search(scored_set, listed, folder, Quiet(progress))


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
    overwrite: bool = False,
    device: str | None = None,
    progress: Say = _unheard,
) -> Path:
    """Write a finished run as a folder that SentenceTransformer(path) loads, and check it.

    Args:
        out: the folder to write; `model` in the run's if None.
        kind: the adapter on its base, or both merged in 16 bits.
        overwrite: replace an export that is there, such as the one that the run has made.

    Raises:
        ValueError: no finished run, or `out` is a folder of something else, or holds an export.
        RuntimeError: the export does not embed as the run's model.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    target = RunFolder(folder).model if out is None else Path(out)
    export_run(folder, target, kind, _device(device), Quiet(progress), overwrite=overwrite)
    write_export_card(RunFolder(folder), target)
    return target


def open_run(folder: str | PathLike[str]) -> Run:
    """A run that is finished, from its folder.

    Raises:
        ValueError: it is not, or its metrics are damaged.
    """
    return Run(Path(folder), read_metrics(RunFolder(Path(folder))))
