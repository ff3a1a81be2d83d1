"""The measured processes of bench/step.py: each row's step, and what is measured around it.

A row is a name: `plain`, `plain_chunks`, `st_N`, `st_tokens_N`, `ours_*` or `loss`. `ROW-FACTOR` is
the row with one of the factors turned off.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lowmem_cft.data import corpus
from lowmem_cft.data.batches import RowOrder, StepTexts, step_texts
from lowmem_cft.data.chunks import Chunk, TokenBatch, cut_by_length, pad
from lowmem_cft.data.rows import TrainRow
from lowmem_cft.data.tokens import query_format
from lowmem_cft.files import cache_folder
from lowmem_cft.gradient import step as step_module
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.gradient.step import ContrastiveStep, candidates_of
from lowmem_cft.machine import choose_device, choose_dtype, keep_freed_memory, peak_bytes
from lowmem_cft.model import backbone
from lowmem_cft.model.adapter import attach_adapter, set_checkpointing, trainable_parameters
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.precision import keep_weight_layout
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.limits import run_limit
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft.planning.recipe_plan import planner_for, shape_of
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.training.demo import choose_data
from lowmem_cft.units import GIB
from lowmem_cft_kernels import Candidates, LossOptions, info_nce
from lowmem_cft_kernels.reference import reference_loss
from measure import machine, median, reset_peak, synchronize

Indices = npt.NDArray[np.int64]

_WARM_UP_ROWS = 16
_PEFT_GRAPH = {"fp32": 2.3, "bf16": 3.0}
"""Resident bytes of a graph of peft's own layers, by what the planner predicts for ours."""
_ADAPTER_STD = 0.02
_LOSS_REPEATS = 7


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
        """As the trainer gathers them."""
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


# -- the adapter, the same on both sides --------------------------------------------------------


def adapter(model: nn.Module) -> list[nn.Parameter]:
    """All that is trained, in an order that does not depend on who attached it."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert named, "nothing is trained"
    assert all("lora_" in name for name in named), "something else is trained"
    return [named[name] for name in sorted(named, key=lambda name: name[name.index("layers.") :])]


def fill_adapter(model: nn.Module) -> None:
    """The same numbers on every side; lora_B not zero, which would leave lora_A no gradient."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter(model):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * _ADAPTER_STD)


def gradient(model: nn.Module) -> npt.NDArray[np.float32]:
    """Of the adapter as one vector, which is then forgotten."""
    parts = []
    for parameter in adapter(model):
        assert parameter.grad is not None, "a step left an adapter weight without gradient"
        parts.append(parameter.grad.float().flatten().cpu().numpy())
        parameter.grad = None
    return np.concatenate(parts)


# -- ours, and the plain step -------------------------------------------------------------------


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


def use_peft_layers(model: nn.Module) -> None:
    """Take our training forward out of the LoRA layers again."""
    lean = [m for m in model.modules() if "lora_A" in m._modules and "forward" in m.__dict__]
    assert lean, "LoRA layers had no forward of ours"
    for module in lean:
        del module.__dict__["forward"]


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
            use_peft_layers(model)
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


# -- one factor turned off ----------------------------------------------------------------------


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
    with patch.object(step_module, *instead[factor]):
        yield


# -- sentence-transformers ----------------------------------------------------------------------


def load_st(task: Task, folder: Path) -> Any:
    """The same base in sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BitsAndBytesConfig

    from lowmem_cft.data.tokens import overhead
    from lowmem_cft.exporting.tokenizer import prepared_tokenizer
    from vs_sentence_transformers import lay_out

    source, recipe, device = task.source, task.recipe, task.device
    text_format = query_format(recipe)
    lay_out(Path(source.name), prepared_tokenizer(source.tokenizer, text_format), folder)
    dtype = choose_dtype(recipe.model.dtype, device)
    kwargs: dict[str, Any] = {"dtype": dtype}
    if quantization := backbone.quantization_kwargs(recipe.model, dtype):
        quantization.pop("quant_method")
        kwargs["quantization_config"] = BitsAndBytesConfig(**quantization)
    if device.type == "cuda":
        kwargs["device_map"] = {"": device}
    cut = ("num_hidden_layers", "layer_types", "scale_depth")
    transformer = Transformer(
        str(folder),
        max_seq_length=overhead(source.tokenizer, text_format) + text_format.max_tokens,
        model_kwargs=kwargs,
        config_kwargs={
            key: getattr(source.config, key) for key in cut if hasattr(source.config, key)
        },
    )
    # The similarity normalises, so a Normalize module would only be work done twice.
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device=str(device))
    model[0].auto_model.requires_grad_(False)
    keep_weight_layout(model)
    if dtype != torch.float32:  # as their trainer does
        model.forward = torch.autocast(device.type, dtype)(model.forward)
    return model


def st_criterion(model: Any, recipe: Recipe, row: str) -> Any:
    """Their cached loss with the mini-batches of a row.

    Raises:
        Skipped: this version has no token budgets.
    """
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss as Loss,
    )

    size = int(row.rpartition("_")[2])
    kwargs = {"mini_batch_size": size}
    if row.startswith("st_tokens_"):
        kwargs = {"mini_batch_num_tokens": size}
        if "mini_batch_num_tokens" not in inspect.signature(Loss.__init__).parameters:
            raise Skipped("this version of sentence-transformers has no mini_batch_num_tokens")
    return Loss(model, scale=1 / recipe.loss.temperature, **kwargs)


def st_side(task: Task, row: str, off: str, folder: Path) -> Side:
    """Their loss, called on features that were tokenised before."""
    from vs_sentence_transformers import add_adapter, check_tokens

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
        features = [to_device(model.preprocess(column), task.device) for column in columns]

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


def to_device(features: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}


# -- measuring ------------------------------------------------------------------------------------


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Weights, buffers, and the scales of 4-bit weights."""
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = getattr(state, "state2", None)


def watched_step(side: Side, step: Prepared) -> dict[str, int]:
    """One step under a counter of live bytes, and of the tokens that get a graph."""
    counts = {"texts": 0, "padded_tokens": 0}

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            counts["texts"] += args[0].shape[0]
            counts["padded_tokens"] += args[0].numel()

    # Not of the whole model: theirs calls its `forward`, past all hooks.
    hook = side.transformer.get_input_embeddings().register_forward_pre_hook(count)
    with LiveBytes(known=[*model_tensors(side.model), *step.held]) as live:
        step.run()
    hook.remove()
    return {"live_bytes": live.peak, **counts}


def trim() -> None:
    """Give back what the allocators hold of loading, so that the base is what is in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            return


def timed(step: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Seconds and loss of a step."""
    synchronize(device)
    started = time.perf_counter()
    loss = step()
    synchronize(device)
    return time.perf_counter() - started, float(loss)


def measure_side(task: Task, side: Side, gradient_file: Path | None) -> dict[str, Any]:
    """Warm up, time the steps, and watch one more."""
    device, steps = task.device, task.options.steps
    fill_adapter(side.model)
    trim()
    reset_peak(device)
    base = peak_bytes(device)  # a peak just reset is what is held now
    # A whole step: a heap is grown and its pages are zeroed once in a run.
    side.prepare(task.rows(steps)[: _WARM_UP_ROWS if task.options.quick else None]).run()
    gradient(side.model)
    seconds, losses = [], []
    for index in range(steps):
        one, loss = timed(side.prepare(task.rows(index)).run, device)
        seconds.append(one)
        losses.append(loss)
        found = gradient(side.model)
        if index == 0 and gradient_file is not None:
            np.save(gradient_file, found)
    rss = peak_bytes(device) - base
    watched = watched_step(side, side.prepare(task.rows(0)))
    return {
        "seconds": seconds,
        "loss": losses[0],
        "rss_bytes": rss,
        "base_bytes": base,
        **watched,
        "how": side.how,
        "plan": side.plan.to_json() if side.plan else None,
    }


def measure_row(task: Task, name: str) -> dict[str, Any]:
    """One row, or why it was skipped."""
    row, _, off = name.partition("-")
    file = task.options.gradients and task.options.gradients / f"{name}.npy"
    try:
        if row == "loss":
            return {"row": name, **measure_losses(task)}
        with tempfile.TemporaryDirectory() as folder, switched_off(off):
            if row.startswith("st_"):
                side = st_side(task, row, off, Path(folder) / "base")
            else:
                side = ours_side(task, row, off)
            return {"row": name, **measure_side(task, side, file)}
    except Skipped as error:
        return {"row": name, "skipped": str(error)}


def measure_losses(task: Task) -> dict[str, Any]:
    """Value and gradient of the loss alone, each side on the same embeddings, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_st(task, Path(folder) / "base")
    criterion = st_criterion(model, task.recipe, "st_32")
    rows, dim = task.recipe.train.logical_batch, model[0].get_embedding_dimension()
    draw = torch.Generator().manual_seed(0)
    emb_SD = nn.functional.normalize(torch.randn(3 * rows, dim, generator=draw), dim=1)
    emb_SD = emb_SD.to(task.device)
    sides = loss_sides(emb_SD, rows, criterion, task.recipe.loss.temperature)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses, peaks = {}, {}
    for repeat in range(_LOSS_REPEATS + 1):
        for side in list(sides) if repeat % 2 else list(sides)[::-1]:
            one, losses[side] = timed(sides[side], task.device)
            if repeat:  # the first one warms up
                seconds[side].append(one)
    for side, run in sides.items():
        with LiveBytes(known=[emb_SD]) as live:
            run()
        peaks[side] = live.peak
    return {
        "ms": {side: round(median(times) * 1e3, 3) for side, times in seconds.items()},
        "losses": losses,
        "live_bytes": peaks,
    }


def loss_sides(
    emb_SD: Tensor, rows: int, criterion: Any, temperature: float
) -> dict[str, Callable[[], Tensor]]:
    """The loss and its gradient by us, by them and by its formula; queries are the first rows."""
    candidates = Candidates(target=torch.arange(rows, device=emb_SD.device))

    def ours() -> Tensor:
        d_emb_SD = torch.empty_like(emb_SD)
        out = d_emb_SD[:rows], d_emb_SD[rows:]
        return info_nce(
            emb_SD[:rows], emb_SD[rows:], candidates, temperature=temperature, out=out
        ).loss

    def st() -> Tensor:
        size = criterion.mini_batch_size
        columns = [emb_SD[i * rows : (i + 1) * rows] for i in range(len(emb_SD) // rows)]
        reps = [[part.detach().requires_grad_() for part in torch.split(c, size)] for c in columns]
        loss: Tensor = criterion.calculate_loss(reps, None, with_backward=True)
        return loss

    def formula() -> Tensor:
        leaf_SD = emb_SD.detach().requires_grad_()
        loss, _ = reference_loss(
            leaf_SD[:rows], leaf_SD[rows:], candidates, LossOptions(temperature=temperature)
        )
        torch.autograd.backward(loss)
        return loss.detach()

    return {"ours": ours, "st": st, "formula": formula}


def shown(row: dict[str, Any]) -> str:
    """One row for people."""
    if "skipped" in row:
        return f"  {row['row']}: skipped: {row['skipped']}"
    if "ms" in row:
        return f"  {row['row']}: {row['ms']} ms"
    return (
        f"  {row['row']}: {median(row['seconds']):.3f} s, {row['live_bytes'] / 2**20:.0f} MiB live, "
        f"{row['rss_bytes'] / 2**20:.0f} MiB resident, loss {row['loss']:.6f}; {row['how']}"
    )


def measure_rows(options: argparse.Namespace) -> dict[str, Any]:
    """The rows of this process, with what is the same for all of them."""
    backbone.quiet_libraries()
    task = make_task(options)
    results = []
    for name in options.row:
        results.append(measure_row(task, name))
        print(shown(results[-1]), file=sys.stderr, flush=True)
    recipe = task.recipe
    return {
        "results": results,
        "machine": machine(task.device),
        "settings": {
            "model": recipe.model.id,
            "keep_layers": recipe.model.keep_layers,
            "dtype": recipe.model.dtype,
            "lora": recipe.lora.model_dump(include={"rank", "alpha", "dropout", "targets"}),
            "max_tokens": recipe.text.max_tokens,
            "pooling": recipe.embedding.pooling,
            "temperature": recipe.loss.temperature,
            "mask_duplicates": recipe.loss.mask_duplicates,
            "data": Path(recipe.data.sources[0].path).name,
            "steps": options.steps,
        },
    }
