"""Rows that run on our encoder: by the planner's chunks, and plain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import replaced
from bench.step.task import Indices, Prepared, Side, Skipped, Task
from lowmem_cft.data.batches import StepTexts
from lowmem_cft.data.chunks import Chunk, TokenBatch, cut_by_length, pad
from lowmem_cft.gradient import step as step_module
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.gradient.step import ContrastiveStep, candidates_of
from lowmem_cft.machine import choose_dtype, keep_freed_memory
from lowmem_cft.model import backbone
from lowmem_cft.model.adapter import attach_adapter, set_checkpointing, trainable_parameters
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.patches import patched_layers
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.limits import run_limit
from lowmem_cft.planning.recipe_plan import planner_for, shape_of
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.units import GIB
from lowmem_cft_kernels import LossOptions
from lowmem_cft_kernels.reference import reference_loss

_PEFT_GRAPH = {"fp32": 2.3, "bf16": 3.0}
"""Resident bytes of a graph of peft's own layers, by what the planner predicts for ours."""


def recipe_of_row(recipe: Recipe, row: str) -> Recipe:
    """The recipe with the memory section that a row of ours stands for."""
    name = row.removeprefix("ours_")
    values: dict[str, Any] = {}
    if not name.startswith("planner"):
        values = {
            "keep_graphs": "on" if name == "kept_all" else "off",
            "checkpointing": "on" if name.endswith("checkpointed") else "off",
        }
    if (budget := name.partition("_")[0]).isdigit():
        values["token_budget"] = int(budget)
    section = recipe.memory.model_copy(update=values)
    return recipe.model_copy(update={"memory": section})


def choose_plan(task: Task, recipe: Recipe, planner: Planner) -> StepPlan:
    """The planner's choice within all that is free, or within `--above-model` over the model.

    Raises:
        Skipped: nothing fits.
    """
    limit = run_limit(recipe, task.device)
    if task.options.above_model is not None:
        fixed = planner.fixed_parts()
        limit = sum(fixed.values()) - fixed["gradients"] + task.options.above_model
    try:
        return planner.choose(recipe.memory, shape_of(recipe, task.data), limit).plan
    except ValueError as error:
        raise Skipped(str(error)) from None


def full_loss(recipe: Recipe, texts: StepTexts, emb_PD: Tensor) -> Tensor:
    """The loss as its formula, through autograd."""
    emb_SD = emb_PD[texts.place_S.to(emb_PD.device)]
    query_MD, doc_ND = emb_SD.tensor_split([texts.num_queries])
    candidates = candidates_of(texts).to(emb_PD.device)
    options = LossOptions(temperature=recipe.loss.temperature)
    return reference_loss(query_MD, doc_ND, candidates, options)[0]


class Ours:
    """Rows that run on our encoder.

    Raises:
        Skipped: no plan fits.
    """

    def __init__(self, task: Task, row: str, off: str) -> None:
        planned_as = "ours_kept_all" if row.startswith("plain") else row
        self.task, self.recipe = task, recipe_of_row(task.recipe, planned_as)
        self.once = row != "plain" and off != "deduplication"
        self.store, self.pad_id = task.data.store, task.source.tokenizer.pad_token_id
        dtype = choose_dtype(self.recipe.model.dtype, task.device)
        longest, config = int(self.store.lengths.max()), task.source.config
        self.planner = planner_for(self.recipe, task.device.type, dtype, longest, config)
        self.plan: StepPlan | None = None
        if row == "plain":
            self._check_plain_fits()
        else:
            self.plan = choose_plan(task, self.recipe, self.planner)
        if off != "freed_memory":
            keep_freed_memory()
        self.encoder = self._load(lean=row != "plain" and off != "lean_layers")
        self.compute = ContrastiveStep(
            self.encoder,
            self.store,
            self.pad_id,
            self.recipe.loss,
            trainable_parameters(self.encoder.model),
            self.planner.chunk_cost,
        )

    def _load(self, *, lean: bool) -> Encoder:
        recipe, seed = self.recipe, self.recipe.train.seed
        clock = DropoutClock(seed=seed)
        base = backbone.load_backbone(recipe.model, self.task.device, source=self.task.source)
        model = attach_adapter(base.model, recipe.lora, clock, seed=seed)
        if not lean:
            patched_layers(model).undo("forward")
        set_checkpointing(model, self.plan.checkpoint_every if self.plan else 0)
        pooling, normalize = recipe.embedding.pooling, recipe.embedding.normalize
        return Encoder(model, pooling=pooling, normalize=normalize, clock=clock)

    def _check_plain_fits(self) -> None:
        task = self.task
        most = 0
        for step in range(task.options.steps):
            lengths_P = self.store.lengths[task.texts(task.rows(step), once=False).text_P]
            most = max(most, len(lengths_P) * int(lengths_P.max()))
        graph = _PEFT_GRAPH[self.recipe.model.dtype] * self.planner.chunk(most, 0).backward_bytes
        need = sum(self.planner.fixed_parts().values()) + graph
        limit = run_limit(self.recipe, task.device)
        if need > limit:
            raise Skipped(
                f"about {need / GIB:.1f} GiB for one graph of {most} padded tokens, "
                f"{limit / GIB:.1f} free"
            )

    def texts(self, rows: Indices) -> StepTexts:
        return self.task.texts(rows, once=self.once)

    def planned(self, rows: Indices) -> Tensor:
        """The trainer's step without its update."""
        assert self.plan is not None
        texts = self.texts(rows)
        with self.encoder.training_mode(step=0):
            report = self.compute(texts, self.plan)
        if report.plan != self.plan:
            raise RuntimeError(f"memory ran out; then it was {report.plan.describe()}")
        return report.loss

    def plain(self, rows: Indices) -> Tensor:
        """One padded batch with its mask, one forward, one backward."""
        texts = self.texts(rows)
        with self.encoder.training_mode(step=0):
            batch = pad(self.store, texts.text_P, self.pad_id)
            emb_PD = self.encoder(replace(batch, right_padded=False))
            loss = full_loss(self.recipe, texts, emb_PD)
            torch.autograd.backward(loss)
        return loss.detach()

    def plain_chunks(self, rows: Indices) -> Tensor:
        """All of our chunks with their graphs, the loss over them, and one backward."""
        assert self.plan is not None
        texts = self.texts(rows)
        lengths_P = self.store.lengths[texts.text_P]
        place_P = torch.arange(len(lengths_P))
        chunks = cut_by_length(
            lengths_P, place_P, self.plan.backward_tokens, self.planner.chunk_cost
        )
        with self.encoder.training_mode(step=0):
            parts = [self._encode(texts, chunk.place_B) for chunk in chunks]
            order = torch.argsort(torch.cat([chunk.place_B for chunk in chunks]))
            emb_PD = torch.cat(parts)[order.to(self.task.device)]
            loss = full_loss(self.recipe, texts, emb_PD)
            torch.autograd.backward(loss)
        return loss.detach()

    def _encode(self, texts: StepTexts, place_B: Tensor) -> Tensor:
        text_B = texts.text_P[place_B.numpy()]
        return self.encoder(pad(self.store, text_B, self.pad_id), place_B)


def ours_side(task: Task, row: str, off: str) -> Side:
    ours = Ours(task, row, off)
    how = ours.plan.describe() if ours.plan else "one padded batch of all texts"
    kinds = {"plain": ours.plain, "plain_chunks": ours.plain_chunks}
    run = kinds.get(row, ours.planned)
    model = ours.encoder.model
    plan = None if row in kinds else ours.plan
    return Side(model, model, lambda rows: Prepared(partial(run, rows)), how, plan)


def cut_in_order(
    lengths_P: Indices, place_B: Tensor, budget: int, chunk_cost: int = 0
) -> list[Chunk]:
    """Chunks of the budget from texts as they come."""
    chunks, start, width = [], 0, 0
    for i, length in enumerate([*lengths_P[place_B.numpy()].tolist(), budget + 1]):
        if i > start and (i - start + 1) * max(width, length) > budget:
            chunks.append(Chunk(place_B[start:i], (i - start) * width))
            start, width = i, 0
        width = max(width, length)
    return chunks


def pad_masked(*args: Any) -> TokenBatch:
    """`pad` without its promise that lets the encoder leave the mask out."""
    return replace(pad(*args), right_padded=False)


@contextmanager
def switched_off(factor: str) -> Iterator[None]:
    """Factors that are a function of the step's module; the others are arguments of `Ours`."""
    instead = {"sorting": ("cut_by_length", cut_in_order), "no_mask": ("pad", pad_masked)}
    if factor not in instead:
        yield
        return
    with replaced(step_module, *instead[factor]):
        yield
