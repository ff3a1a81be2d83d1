"""A recipe put together: its data, its model and its optimizer, ready for the first step.

    sources -> rows -> tokens -> plan -> backbone -> adapter -> optimizer

The plan comes before the weights, so that a step which cannot fit is refused before they are
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lowmem_cft import machine
from lowmem_cft.data.batches import RowOrder, StepTexts, step_texts
from lowmem_cft.data.corpus import Corpus, build_corpus, read_sources, rows_sha256
from lowmem_cft.data.rows import TrainRow
from lowmem_cft.evaluation.sts.sets import LoadedSet, data_folder, load_set
from lowmem_cft.files import cache_folder
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.gradient.step import ContrastiveStep
from lowmem_cft.model.adapter import attach_adapter, set_checkpointing, trainable_parameters
from lowmem_cft.model.backbone import Backbone, BackboneSource, find_backbone, load_backbone
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.trainable import check_trains, notes_on
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.limits import cap_allocator, run_limit
from lowmem_cft.planning.recipe_plan import check_texts, planner_for, shape_of
from lowmem_cft.progress import Says
from lowmem_cft.recipe.schema import LossSection, Recipe
from lowmem_cft.training.optimizer import make_optimizer, make_scheduler
from lowmem_cft.units import GIB
from lowmem_cft_kernels import LearnedTemperature


@dataclass(frozen=True)
class TrainingJob:
    """What a run's steps work on and with.

    `plan` is that of the first step. `parameters` are the adapter's; `temperature` is there where
    the recipe learns it, and the optimizer trains it with them. `rows_sha256` has a checksum of the
    rows of each source.
    """

    recipe: Recipe
    device: torch.device
    order: RowOrder
    num_steps: int
    rows_sha256: list[str]
    corpus: Corpus
    eval_sets: list[LoadedSet]
    plan: StepPlan
    backbone: Backbone
    encoder: Encoder
    parameters: list[nn.Parameter]
    temperature: LearnedTemperature | None
    compute: ContrastiveStep
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler

    @property
    def trained(self) -> list[nn.Parameter]:
        """All that the optimizer trains."""
        return [*self.parameters, *_parameters_of(self.temperature)]

    def visible_share(self, texts: StepTexts) -> float:
        """Share of the other documents of a step that an anchor sees where nothing is masked.

        It is 1 but where hard negatives are seen by their own row only.
        """
        num_rows, num_documents = texts.num_queries, len(texts.place_S) - texts.num_queries
        if self.recipe.loss.hard_negatives != "own":
            return 1.0
        negatives_per_row = (num_documents - num_rows) / num_rows
        return (num_rows - 1 + negatives_per_row) / (num_documents - 1)

    def texts_of(self, step_index: int) -> StepTexts:
        """The texts of a step, counted from 0."""
        recipe = self.recipe
        encode_once = {"auto": recipe.lora.dropout == 0, "once": True, "each": False}
        return step_texts(
            self.corpus.table,
            self.order.rows(step_index),
            hard_negatives=recipe.loss.hard_negatives,
            mask_duplicates=recipe.loss.mask_duplicates,
            encode_twins_once=encode_once[recipe.train.duplicates],
            both_ways=recipe.loss.softmaxes != "one_way",
        )


def assemble(
    recipe: Recipe,
    observer: Says,
    *,
    rows: Sequence[TrainRow] | None = None,
    device: torch.device | None = None,
    offline: bool = False,
    last_plan: StepPlan | None = None,
) -> TrainingJob:
    """Read the recipe's data, plan its steps, load its model, and set all of it up.

    Args:
        observer: is told what was read and planned.
        rows: trained on in the place of the recipe's sources.
        device: the GPU where there is one, if not given.
        offline: data are looked for on this machine only.
        last_plan: the plan of a run that is resumed, taken again if it still fits.

    Raises:
        ValueError: a mistake in the recipe, its data or its model, or no plan fits.
    """
    device = device or machine.choose_device()
    sources = [rows] if rows is not None else _read_sources(recipe, observer, offline=offline)
    order, num_steps = _row_order(recipe, sources)
    observer.say(
        f"an epoch has {order.rows_per_epoch} rows in {order.steps_per_epoch} steps of "
        f"{recipe.train.logical_batch}; {num_steps} steps in all"
    )
    eval_sets = _read_eval_sets(recipe, offline=offline)
    source = find_backbone(recipe.model, observer.say)
    check_trains(source.config, recipe.model, recipe.lora)
    for note in notes_on(source.config):
        observer.say(note)
    corpus = _tokenise(recipe, sources, source, observer)
    planner, plan = _plan_steps(recipe, corpus, source, device, observer, last_plan)
    machine.keep_freed_memory()
    machine.grow_cuda_blocks(device)
    backbone = load_backbone(recipe.model, device, observer.say, source)
    encoder = _make_encoder(recipe, backbone)
    parameters = trainable_parameters(encoder.model)
    temperature = _learned_temperature(recipe.loss, device)
    step = ContrastiveStep(
        encoder,
        corpus.store,
        backbone.tokenizer.pad_token_id,
        recipe.loss,
        parameters,
        planner.chunk_cost,
        temperature,
    )
    set_checkpointing(encoder.model, plan.checkpoint_every)
    optimizer = make_optimizer(
        parameters, recipe.train, device, undecayed=_parameters_of(temperature)
    )
    return TrainingJob(
        recipe=recipe,
        device=device,
        order=order,
        num_steps=num_steps,
        rows_sha256=[rows_sha256(source) for source in sources],
        corpus=corpus,
        eval_sets=eval_sets,
        plan=plan,
        backbone=backbone,
        encoder=encoder,
        parameters=parameters,
        temperature=temperature,
        compute=step,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, recipe.train, num_steps),
        scaler=_make_scaler(backbone.dtype, device),
    )


def _read_sources(recipe: Recipe, observer: Says, *, offline: bool) -> Sequence[Sequence[TrainRow]]:
    sources, reports = read_sources(recipe.data, offline=offline)
    for rows, report in zip(sources, reports, strict=True):
        num_skipped = sum(report.skipped.values())
        num_negatives = sum(len(row.negatives) for row in rows)
        named = ", ".join(
            f"{role}: {_listed(used)}" for role, used in report.columns.items() if used
        )
        observer.say(
            f"{report.source}: {report.num_read} rows, {num_skipped} skipped ({named}); trained on: "
            f"{len(rows)} pairs of an anchor and a positive, with {num_negatives} hard negatives"
        )
    return sources


def _listed(columns: str | list[str]) -> str:
    return columns if isinstance(columns, str) else " ".join(columns)


def _read_eval_sets(recipe: Recipe, *, offline: bool) -> list[LoadedSet]:
    limit = recipe.eval.limit
    return [load_set(name, data_folder(), limit, offline=offline) for name in recipe.eval.sets]


def _tokenise(
    recipe: Recipe, sources: Sequence[Sequence[TrainRow]], source: BackboneSource, observer: Says
) -> Corpus:
    corpus = build_corpus(sources, recipe, source.tokenizer, cache_folder())
    origin = "read from the cache" if corpus.from_cache else "tokenised once"
    observer.say(f"{len(corpus.store)} distinct texts, {origin}")
    for note in check_texts(recipe, source.config, source.tokenizer, corpus.store):
        observer.say(note)
    return corpus


def _row_order(recipe: Recipe, sources: Sequence[Sequence[TrainRow]]) -> tuple[RowOrder, int]:
    """The order in which rows are trained on, and the number of steps."""
    section = recipe.train
    weights = [source.weight for source in recipe.data.sources]
    order = RowOrder(
        [len(source) for source in sources], weights, section.logical_batch, section.seed
    )
    return order, section.num_steps(order.steps_per_epoch * section.logical_batch)


def _plan_steps(
    recipe: Recipe,
    corpus: Corpus,
    source: BackboneSource,
    device: torch.device,
    observer: Says,
    last_plan: StepPlan | None,
) -> tuple[Planner, StepPlan]:
    """Plan the steps from the model's configuration; the last plan is taken if it fits."""
    cap_allocator(recipe, device)
    limit = run_limit(recipe, device)
    shape = shape_of(recipe, corpus)
    dtype = machine.choose_dtype(recipe.model.dtype, device)
    planner = planner_for(recipe, device.type, dtype, shape.longest, source.config)
    prediction = planner.choose(recipe.memory, shape, limit)
    if last_plan is not None:
        as_before = planner.predict(last_plan, shape)
        prediction = as_before if as_before.peak_bytes <= limit else prediction
    observer.say(
        f"plan: {prediction.plan.describe()}; about {prediction.peak_bytes / GIB:.2f} of "
        f"{limit / GIB:.2f} GiB, {prediction.relative_cost:.2f} times the cost of plain training "
        f"on the whole batch at once; {planner.footprint.weights.num_trained:,} weights to train"
    )
    return planner, prediction.plan


def _make_encoder(recipe: Recipe, backbone: Backbone) -> Encoder:
    seed = recipe.train.seed
    clock = DropoutClock(seed=seed)
    revision = recipe.model.revision
    model = attach_adapter(backbone.model, recipe.lora, clock, seed=seed, revision=revision)
    section = recipe.embedding
    return Encoder(model, pooling=section.pooling, normalize=section.normalize, clock=clock)


def _learned_temperature(section: LossSection, device: torch.device) -> LearnedTemperature | None:
    if not section.learn_temperature:
        return None
    return LearnedTemperature(section.temperature, *section.temperature_bounds).to(device)


def _parameters_of(temperature: LearnedTemperature | None) -> list[nn.Parameter]:
    return [] if temperature is None else list(temperature.parameters())


def _make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Scales losses in float16 on a GPU; elsewhere it changes nothing."""
    scaled = dtype == torch.float16 and device.type == "cuda"
    return torch.amp.GradScaler(device.type, enabled=scaled)
