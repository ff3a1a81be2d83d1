"""A whole training run as one call: folder, training, export, check, model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lowmem_cft.data.corpus import query_format
from lowmem_cft.data.tokens import TextFormat, Tokenizer, overhead, tokenize
from lowmem_cft.evaluation.sts.score import LoadedSet
from lowmem_cft.export.card import model_card
from lowmem_cft.export.layout import (
    NUM_CHECKED,
    Kind,
    check_export,
    check_expressible,
    export_model,
)
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import TEXT_SLOT, Recipe
from lowmem_cft.training import runs
from lowmem_cft.training.trainer import Observer, Trainer


class Says(Protocol):
    """Whoever passes a note on to the user."""

    def say(self, text: str) -> None: ...


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
        return []
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
        interrupt.Interrupted: Ctrl-C; resumable.
        RuntimeError: the machine's limits, or an export that does not embed as trained.
    """
    if recipe.output.export != "none":
        check_expressible(recipe)
    folder = runs.open_run(recipe, resume=resume, overwrite=overwrite)
    try:
        trainer = Trainer(recipe, folder, observer, resume=resume, offline=offline)
        folder.begun()
        metrics = trainer.train()
    except BaseException:
        folder.withdraw()
        raise
    if recipe.output.export != "none":
        kind: Kind = recipe.output.export
        observer.say(f"exporting to {folder.model}")
        export_model(trainer.encoder, trainer.backbone, recipe, folder.model, kind)
        outcome = checked(
            folder.model,
            kind,
            trainer.encoder,
            trainer.backbone.tokenizer,
            recipe,
            observer,
            check_texts(trainer.eval_sets),
        )
        metrics["export"] = {"kind": kind, **outcome}
        runs.write_json(folder.metrics, metrics)
    hub_base = not Path(trainer.backbone.name).exists()
    card = model_card(recipe, metrics, folder.model, hub_base=hub_base)
    (folder.path / "README.md").write_text(card, encoding="utf-8")
    if folder.model.is_dir():
        (folder.model / "README.md").write_text(card, encoding="utf-8")
    return folder, metrics


def checked(
    target: Path,
    kind: Kind,
    encoder: Encoder,
    tokenizer: Tokenizer,
    recipe: Recipe,
    observer: Says,
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """Compare an export with its model and say so; what to record of it.

    Args:
        texts: to compare on; those that truncation would cut are left out, since a whole prompt
            is cut before its tail here and not at all by sentence-transformers.

    Raises:
        RuntimeError: it does not embed as the model it was made from.
    """
    text_format = query_format(recipe)
    fitting = fitting_texts(tokenizer, texts, text_format)
    try:
        check = check_export(
            target, kind, encoder, tokenizer, recipe, fitting or list(_PLAIN_TEXTS)
        )
    except (ImportError, torch.OutOfMemoryError) as error:
        reason = (
            "sentence-transformers is not installed (pip install 'lowmem-cft[check]')"
            if isinstance(error, ImportError)
            else "the device has no room for a second copy of the model"
        )
        observer.say(f"NOT CHECKED: the export was not compared with the trained model: {reason}")
        return {"checked": False}
    observer.say(
        f"export checked on {check.num_texts} texts: lowest cosine {check.min_cosine:.6f} "
        f"({check.min_cosine_as_loaded:.4f} in 16-bit arithmetic)"
    )
    return {"checked": True, **vars(check)}


def fitting_texts(tokenizer: Tokenizer, texts: Sequence[str], text_format: TextFormat) -> list[str]:
    """The first texts that are not truncated, as many as a check compares."""
    texts = list(texts[: 4 * NUM_CHECKED])
    if not texts:
        return []
    bare = TextFormat(TEXT_SLOT, append_eos=False, max_tokens=text_format.max_tokens + 1)
    lengths = tokenize(tokenizer, texts, bare).lengths - overhead(tokenizer, bare)
    fits = [t for t, n in zip(texts, lengths, strict=True) if n <= text_format.max_tokens]
    return fits[:NUM_CHECKED]
