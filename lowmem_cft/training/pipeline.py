"""A whole training run as one call: folder, training, export, check, model card."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowmem_cft.data.corpus import with_rows
from lowmem_cft.data.rows import TrainRow
from lowmem_cft.evaluation.sts.sets import LoadedSet
from lowmem_cft.exporting.finished import export_model
from lowmem_cft.exporting.layout import Kind, check_expressible
from lowmem_cft.exporting.rehearsal import rehearse_export
from lowmem_cft.inference.loading import Embedder
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training import runs
from lowmem_cft.training.card import model_card, write_export_card
from lowmem_cft.training.checkpoint import load_state, saved_step
from lowmem_cft.training.interrupt import interrupts_say
from lowmem_cft.training.job import TrainingJob, assemble
from lowmem_cft.training.names import check_names
from lowmem_cft.training.records import ExportRecord, Metrics
from lowmem_cft.training.trainer import Observer, Trainer


def check_texts(sets: list[LoadedSet]) -> list[str]:
    """Distinct sentences of the first set, to compare an export with its model."""
    if not sets:
        return []
    return list(dict.fromkeys(pair.sentence1 for pair in sets[0].pairs))


def run_recipe(
    recipe: Recipe,
    observer: Observer,
    *,
    rows: Sequence[TrainRow] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    new_rate: bool = False,
    device: torch.device | None = None,
    offline: bool = False,
) -> tuple[RunFolder, Metrics]:
    """Train, export, check the export, write the model card.

    Args:
        rows: trained on in the place of the recipe's sources; the run's recipe names them by their
            checksum.
        new_rate: a resumed run may go on at a higher learning rate than it would have had.
        device: the GPU where there is one, if not given.

    Returns:
        The run's folder and its metrics (also in metrics.json).

    Raises:
        ValueError: the user's mistake: recipe, data, model or folder.
        interrupt.Interrupted: Ctrl-C; the message says what is kept.
        RuntimeError: the machine's limits, or an export that does not embed as trained.
    """
    if new_rate and not resume:
        raise ValueError("`new_rate` goes with `resume`: a new run has the recipe's learning rate")
    if recipe.output.export != "none":
        check_expressible(recipe)
    check_names(recipe, rows_in_memory=rows is not None)
    if rows is not None:
        recipe = with_rows(recipe, rows)
    folder = runs.open_run(recipe, resume=resume, overwrite=overwrite, new_rate=new_rate)
    begun = [folder] if resume else []
    with interrupts_say(lambda: _what_is_kept(folder, begun=bool(begun))):
        try:
            state = load_state(folder) if resume else None
            job = assemble(
                recipe,
                observer,
                rows=rows,
                device=device,
                offline=offline,
                last_plan=None if state is None else state.plan,
            )
            if recipe.output.export != "none" and (state is None or state.step < job.num_steps):
                _rehearse(job, recipe.output.export, folder, observer)
            trainer = Trainer(job, folder, observer, state, new_rate=new_rate)
            if resume:
                runs.keep_recipe(folder, recipe)
            folder.begun()
            begun.append(folder)
            metrics = trainer.train()
        except BaseException:
            folder.withdraw()
            raise
        if recipe.output.export != "none":
            record = _export(job, recipe.output.export, folder, observer)
            metrics = metrics.model_copy(update={"export": record})
            metrics.write(folder)
        _write_card(job, folder, metrics)
    return folder, metrics


def _what_is_kept(folder: RunFolder, *, begun: bool) -> str:
    step = saved_step(folder) if begun else None
    if step is None:
        # what `overwrite` would have replaced is back when this is said
        old = f"; {folder.path} is as it was" if not begun and folder.path.exists() else ""
        return f"stopped; no step was saved yet, so there is nothing to go on from{old}"
    return (
        f"stopped; {folder.checkpoint} keeps step {step}; go on from it with the same command and "
        "`resume`"
    )


def _rehearse(job: TrainingJob, kind: Kind, folder: RunFolder, observer: Observer) -> None:
    embedder = Embedder(job.encoder, job.backbone, job.recipe)
    rehearse_export(embedder, folder.model, kind, observer, check_texts(job.eval_sets))


def _export(job: TrainingJob, kind: Kind, folder: RunFolder, observer: Observer) -> ExportRecord:
    """Write the trained model as sentence-transformers loads it, and check it."""
    observer.say(f"exporting to {folder.model}")
    embedder = Embedder(job.encoder, job.backbone, job.recipe)
    texts = check_texts(job.eval_sets)
    check = export_model(embedder, folder.model, kind, observer, texts=texts)
    outcome = {} if check is None else vars(check)
    return ExportRecord(kind=kind, checked=check is not None, **outcome)


def _write_card(job: TrainingJob, folder: RunFolder, metrics: Metrics) -> None:
    card = model_card(job.recipe, metrics, job.backbone.name, None)
    (folder.path / "README.md").write_text(card, encoding="utf-8")
    if folder.model.is_dir():
        write_export_card(folder, folder.model)
