"""What the stages of a reproduction do: describe the data, evaluate, train, search, transfer."""

from __future__ import annotations

import gc
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_cft.data import corpus
from lowmem_cft.evaluation.search.demonstrations import Demonstration
from lowmem_cft.evaluation.search.search import SearchedModel
from lowmem_cft.evaluation.sts.protocols import Protocol
from lowmem_cft.evaluation.sts.report import report
from lowmem_cft.evaluation.sts.score import score_pairs
from lowmem_cft.evaluation.sts.sets import LoadedSet
from lowmem_cft.evaluation.transfer.report import partial_reports
from lowmem_cft.evaluation.transfer.tasks import TransferTask
from lowmem_cft.files import sha256_of
from lowmem_cft.inference.embed import Embed
from lowmem_cft.inference.kept_vectors import KeptVectors
from lowmem_cft.inference.loading import Embedder, load_by_recipe
from lowmem_cft.machine import choose_device
from lowmem_cft.papers.results import (
    Curve,
    Data,
    Evaluation,
    Search,
    Source,
    Training,
    Transfer,
)
from lowmem_cft.papers.stages import Observer
from lowmem_cft.recipe.load import load_saved
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training import runs as run
from lowmem_cft.training.checkpoint import saved_step
from lowmem_cft.training.interrupt import Interrupted
from lowmem_cft.training.pipeline import run_recipe
from lowmem_cft.training.records import read_lines, read_metrics


@contextmanager
def _loaded(recipe: Recipe, adapter: Path | None, observer: Observer) -> Iterator[Embedder]:
    """Load the model; give its memory back afterwards, since a later stage loads another."""
    device = choose_device()
    loaded = load_by_recipe(recipe, device, observer.say, adapter)
    try:
        yield loaded
    finally:
        del loaded
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Unfinished:
    """Where a stage keeps vectors until it is done, and what they depend on besides the text."""

    folder: Path
    identity: Mapping[str, Any]

    def keeping(self, embed: Embed) -> KeptVectors:
        return KeptVectors(embed, self.folder, self.identity)


def evaluate_sets(
    recipe: Recipe,
    adapter: Path | None,
    sets: Sequence[LoadedSet],
    protocol: Protocol | None,
    out: Path,
    unfinished: Unfinished,
    observer: Observer,
    *,
    cleaned_up: bool = False,
) -> Evaluation:
    """Score the sets (already cleaned up, if so) and write the report to `out`.

    Args:
        unfinished: where the vectors of a set stay if it stops before the last one.
    """
    with _loaded(recipe, adapter, observer) as loaded:
        scored = []
        embed = unfinished.keeping(loaded.embed)
        observer.begin(len(sets), 0, what="sets")
        for loaded_set in sets:
            scored.append(score_pairs(embed, loaded_set))
            observer.advance(1)
            observer.say(f"{loaded_set.name}: {100 * scored[-1].score.spearman:.2f}")
    whole = report(recipe.model.id, scored, protocol=protocol, cleaned_up=cleaned_up)
    out.parent.mkdir(parents=True, exist_ok=True)
    whole.write(out)
    embed.remove()
    values = {**whole.to_json(), "report": f"{out.parent.name}/{out.name}"}
    return Evaluation.model_validate(values)


def describe_data(
    recipe: Recipe, scored_texts: set[str], published_rows: int, *, offline: bool
) -> Data:
    """What is trained on, and how many of its texts stand among those that are scored."""
    sources, reports = corpus.read_sources(recipe.data, offline=offline)
    texts: set[str] = set()
    checksum = hashlib.sha256()
    for row in itertools.chain(*sources):
        texts |= {row.anchor, row.positive, *row.negatives}
        checksum.update(repr((row.anchor, row.positive, tuple(row.negatives))).encode())
    return Data(
        sources=[
            Source(
                path=section.path,
                where=section.where,
                rows=len(rows),
                skipped=sum(report.skipped.values()),
                sha256=sha256_of(Path(section.path)) if Path(section.path).is_file() else None,
            )
            for section, rows, report in zip(recipe.data.sources, sources, reports, strict=True)
        ],
        rows=sum(len(rows) for rows in sources),
        rows_sha256=checksum.hexdigest(),
        distinct_texts=len(texts),
        texts_in_evaluation=len(texts & scored_texts),
        published_rows=published_rows,
    )


def train(recipe: Recipe, published_steps: int, observer: Observer, *, offline: bool) -> Training:
    """Train as the recipe says, going on with what its folder holds."""
    assert recipe.output.name is not None
    folder = RunFolder(Path(recipe.output.folder) / recipe.output.name)
    if not _is_finished(folder, recipe):
        same = folder.recipe.is_file() and _trains_the_same(folder, recipe)
        started = [folder.checkpoint, folder.checkpoint.with_name("checkpoint.old")]
        resume = same and any(path.is_dir() for path in started)
        try:
            run_recipe(recipe, observer, resume=resume, overwrite=not resume, offline=offline)
        except Interrupted as error:
            kept = saved_step(folder)
            raise Interrupted(
                f"stopped in training ({recipe.output.name}); the same command goes on "
                + ("with its first step" if kept is None else f"after its step {kept}")
            ) from error
    metrics, lines = read_metrics(folder), read_lines(folder)
    untrained = metrics.before[0]
    points = [(line.step, line.spearman) for line in lines if line.spearman is not None]
    return Training(
        run=recipe.output.name,
        steps=metrics.steps,
        learning_rate=recipe.train.learning_rate,
        logical_batch=recipe.train.logical_batch,
        rows=metrics.rows,
        losses=[(line.step, line.loss) for line in lines],
        curve=Curve(set=untrained.name, points=[(0, untrained.spearman), *points]),
        metrics=metrics,
        published_steps=published_steps,
    )


def put_away(folder: Path) -> None:
    """Rename to NAME.old, which goes if there is one, so that nothing is lost by a slip."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)


def _trains_the_same(folder: RunFolder, recipe: Recipe) -> bool:
    then, now = load_saved(folder.recipe).model_dump(), recipe.model_dump()
    return all(now[name] == then[name] for name in then if name not in run.MAY_CHANGE)


def _is_finished(folder: RunFolder, recipe: Recipe) -> bool:
    if not (folder.metrics.is_file() and folder.recipe.is_file() and folder.adapter.is_dir()):
        return False
    exported = recipe.output.export == "none" or read_metrics(folder).export is not None
    return exported and _trains_the_same(folder, recipe)


def search_demonstration(
    recipe: Recipe,
    scored_set: LoadedSet,
    demonstrations: Sequence[Demonstration],
    folder: Path,
    observer: Observer,
) -> Search:
    """Score every demonstration before the recipe's template; trials are kept in the folder."""
    with _loaded(recipe, None, observer) as loaded:
        template = recipe.text.template
        searched = SearchedModel(recipe.model.id, loaded, template)
        trials = searched.search(scored_set, demonstrations, folder, observer).trials
    return Search(
        trials=trials,
        set=scored_set.name,
        pairs=len(scored_set.pairs),
        template=template,
        best_template=trials[0].template(template),
    )


def score_transfer(
    recipe: Recipe,
    adapter: Path | None,
    tasks: Callable[[], list[TransferTask]],
    unfinished: Unfinished,
    observer: Observer,
    *,
    cleaned_up: bool = False,
) -> Transfer:
    """Accuracy of logistic regressions on raw embeddings, those before normalisation."""
    listed = tasks()
    raw = recipe.with_values("embedding", normalize=False)
    with _loaded(raw, adapter, observer) as loaded:
        embed = unfinished.keeping(loaded.embed)
        *_, whole = partial_reports(
            listed,
            embed,
            model=recipe.model.id,
            device=choose_device(),
            cleaned_up=cleaned_up,
            say=observer.say,
        )
    embed.remove()
    return Transfer.model_validate(whole.to_json())
