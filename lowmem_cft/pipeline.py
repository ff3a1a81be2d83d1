"""A whole training run as one call: folder, training, export, check, model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem_cft import run as runs
from lowmem_cft.card import model_card
from lowmem_cft.evaluate import LoadedSet
from lowmem_cft.export import Kind, check_export, export_model
from lowmem_cft.recipe import Recipe
from lowmem_cft.train import Observer, Trainer

_PLAIN_TEXTS = (
    "A short sentence.",
    "The committee had postponed its decision until the auditors had seen all the books.",
    "Nobody told her that the last train was cancelled.",
    "Water boils at a lower temperature in the mountains.",
)
"""Compared after the export where the recipe evaluates on no set."""


def check_texts(sets: list[LoadedSet]) -> list[str]:
    """Distinct sentences of the first set, to compare an export with its model."""
    if not sets:
        return list(_PLAIN_TEXTS)
    return list(dict.fromkeys(pair.sentence1 for pair in sets[0].pairs))


def run_recipe(
    recipe: Recipe,
    observer: Observer,
    *,
    resume: bool = False,
    overwrite: bool = False,
    offline: bool = False,
) -> tuple[runs.RunFolder, dict[str, Any]]:
    """Train, export, check the export, write the model card.

    Returns:
        The run's folder and its metrics (also in metrics.json).

    Raises:
        ValueError: the user's mistake: recipe, data, model or folder.
        train.Interrupted: Ctrl-C; resumable.
        RuntimeError: the machine's limits, or an export that does not embed as trained.
    """
    folder = runs.open_run(recipe, resume=resume, overwrite=overwrite)
    try:
        trainer = Trainer(recipe, folder, observer, resume=resume, offline=offline)
    except ValueError:
        _remove_if_unused(folder)
        raise
    metrics = trainer.train()
    if recipe.output.export != "none":
        kind: Kind = recipe.output.export
        observer.say(f"exporting to {folder.model}")
        export_model(trainer.encoder, trainer.backbone, recipe, folder.model, kind)
        metrics["export"] = {"kind": kind, **_checked(trainer, folder.model, kind, observer)}
        runs.write_json(folder.metrics, metrics)
    hub_base = not Path(trainer.backbone.name).exists()
    card = model_card(recipe, metrics, folder.model, hub_base=hub_base)
    (folder.path / "README.md").write_text(card, encoding="utf-8")
    if folder.model.is_dir():
        (folder.model / "README.md").write_text(card, encoding="utf-8")
    return folder, metrics


def _checked(trainer: Trainer, target: Path, kind: Kind, observer: Observer) -> dict[str, Any]:
    try:
        check = check_export(
            target,
            kind,
            trainer.encoder,
            trainer.backbone.tokenizer,
            trainer.recipe,
            check_texts(trainer.eval_sets),
        )
    except ImportError:
        observer.say(
            "NOT CHECKED: the export was not compared with the trained model, because "
            "sentence-transformers is not installed (pip install 'lowmem-cft[check]')"
        )
        return {"checked": False}
    observer.say(
        f"export checked on {check.num_texts} texts: cosine {check.min_cosine:.6f} or more"
    )
    return {"checked": True, **vars(check)}


def _remove_if_unused(folder: runs.RunFolder) -> None:
    """Take back a folder that holds nothing but the recipe: the run never began."""
    if [entry.name for entry in folder.path.iterdir()] == [folder.recipe.name]:
        folder.recipe.unlink()
        folder.path.rmdir()
