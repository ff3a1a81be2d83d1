"""Rows that run sentence-transformers' cached loss."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.loss.sides import cached_loss
from bench.peers import add_adapter, base_in_st, check_tokens
from bench.step.task import Indices, Prepared, Side, Skipped, Task
from lowmem_cft.data.tokens import query_format
from lowmem_cft.machine import choose_dtype, keep_freed_memory
from lowmem_cft.recipe.schema import Recipe


def load_st(task: Task, folder: Path) -> Any:
    """The same base in sentence-transformers."""
    recipe, device = task.recipe, task.device
    model = base_in_st(recipe.model, task.source, query_format(recipe), device, folder)
    dtype = choose_dtype(recipe.model.dtype, device)
    if dtype != torch.float32:  # as their trainer does
        model.forward = torch.autocast(device.type, dtype)(model.forward)
    return model


def st_criterion(model: Any, recipe: Recipe, row: str) -> Any:
    """Their cached loss with the mini-batches of a row.

    Raises:
        Skipped: this version has no token budgets.
    """
    loss = cached_loss()
    size = int(row.rpartition("_")[2])
    kwargs = {"mini_batch_size": size}
    if row.startswith("st_tokens_"):
        kwargs = {"mini_batch_num_tokens": size}
        if "mini_batch_num_tokens" not in inspect.signature(loss.__init__).parameters:
            raise Skipped("this version of sentence-transformers has no mini_batch_num_tokens")
    return loss(model, scale=1 / recipe.loss.temperature, **kwargs)


def st_side(task: Task, row: str, off: str, folder: Path) -> Side:
    """Their loss, called on features that were tokenised before."""
    if off != "freed_memory":
        keep_freed_memory()
    model = load_st(task, folder)
    table = [row for rows in task.sources for row in rows]
    some = [text for i in task.rows(0)[:64] for text in (table[i].anchor, table[i].positive)]
    check_tokens(model, task.source.tokenizer, task.recipe, some)
    add_adapter(model, task.recipe)
    criterion = st_criterion(model, task.recipe, row)

    def prepare(rows: Indices) -> Prepared:
        chosen = [table[int(i)] for i in rows]
        columns = [[row.anchor for row in chosen], [row.positive for row in chosen]]
        columns += [list(column) for column in zip(*(row.negatives for row in chosen), strict=True)]
        features = [on_device(model.preprocess(column), task.device) for column in columns]

        def run() -> Tensor:
            loss: Tensor = criterion(list(features), None)
            torch.autograd.backward(loss)
            return loss.detach()

        tensors = [v for column in features for v in column.values() if isinstance(v, Tensor)]
        return Prepared(run, tensors)

    model.train()
    what = "tokens" if row.startswith("st_tokens_") else "texts"
    how = f"mini-batches of {row.rpartition('_')[2]} {what}"
    return Side(model, model[0].auto_model, prepare, how)


def on_device(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}
