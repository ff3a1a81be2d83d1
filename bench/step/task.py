"""What all rows of a process share: settings, data, the order of the rows, what a side is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lowmem_cft.data import corpus
from lowmem_cft.data.batches import RowOrder, StepTexts, step_texts
from lowmem_cft.data.rows import TrainRow
from lowmem_cft.files import cache_folder
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.machine import choose_device
from lowmem_cft.model import backbone
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.training.demo import choose_data

Indices = npt.NDArray[np.int64]


class Skipped(Exception):
    """The row cannot be measured here; says why."""


@dataclass(frozen=True)
class Prepared:
    """A step: `run` adds its gradient and gives its loss. `held`: tensors made before it."""

    run: Callable[[], Tensor]
    held: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Side:
    """A row ready to run.

    `prepare` takes a step's rows and is not timed. `plan` is None where the row has none.
    """

    model: nn.Module
    transformer: Any
    prepare: Callable[[Indices], Prepared]
    how: str
    plan: StepPlan | None = None


@dataclass(frozen=True)
class Task:
    """What all rows of a process share: settings, data, and the order of the rows."""

    options: argparse.Namespace
    recipe: Recipe
    device: torch.device
    sources: list[list[TrainRow]]
    order: RowOrder

    @cached_property
    def source(self) -> backbone.BackboneSource:
        return backbone.find_backbone(self.recipe.model)

    @cached_property
    def data(self) -> corpus.Corpus:
        tokenizer = self.source.tokenizer
        return corpus.build_corpus(self.sources, self.recipe, tokenizer, cache_folder())

    def rows(self, step: int) -> Indices:
        return self.order.rows(step)

    def texts(self, rows: Indices, *, once: bool) -> StepTexts:
        """The step's texts as the trainer gathers them."""
        return step_texts(
            self.data.table,
            rows,
            hard_negatives=self.recipe.loss.hard_negatives,
            mask_duplicates=self.recipe.loss.mask_duplicates,
            encode_twins_once=once,
        )


def make_task(options: argparse.Namespace) -> Task:
    """The demo recipe with the options' settings, and its data."""
    _, overrides = choose_data(offline=True)
    values = {
        "model.keep_layers": options.layers,
        "model.quantization": options.quantization[0],
        "model.dtype": options.dtype,
        "lora.rank": options.rank,
        "lora.alpha": 2 * options.rank,
        "loss.mask_duplicates": False,
        "train.logical_batch": options.batch[0],
    }
    overrides += [f"{key}={json.dumps(value)}" for key, value in values.items()]
    recipe = load_recipe("demo", overrides)
    sources, _ = corpus.read_sources(recipe.data, offline=True)
    weights = [source.weight for source in recipe.data.sources]
    sizes = [len(rows) for rows in sources]
    order = RowOrder(sizes, weights, recipe.train.logical_batch, recipe.train.seed)
    return Task(options, recipe, choose_device(), sources, order)
