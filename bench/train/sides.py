"""The measured processes: the same training by our trainer and by sentence-transformers'."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from bench.device import reset_peak, synchronize, timed
from bench.harness import machine, say
from bench.loss.sides import cached_loss
from bench.peers import add_adapter, base_in_st, check_tokens
from lowmem_cft.data import corpus
from lowmem_cft.data.batches import RowOrder
from lowmem_cft.data.chunks import pad
from lowmem_cft.data.rows import TrainRow
from lowmem_cft.data.tokens import query_format, tokenize
from lowmem_cft.evaluation.sts import score as evaluate
from lowmem_cft.evaluation.sts import sets
from lowmem_cft.machine import choose_device, choose_dtype, dtype_name, peak_bytes
from lowmem_cft.model.backbone import find_backbone, quiet_libraries
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.progress import Quiet
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.training import runs
from lowmem_cft.training.demo import choose_data
from lowmem_cft.training.job import assemble
from lowmem_cft.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

_WARM_UP_TEXTS = 32
_QUICK_PAIRS = 200


@dataclass(frozen=True)
class SideResult:
    """What one side measured in its process."""

    seconds: list[float]
    losses: list[float]
    peak_bytes: int
    base_bytes: int
    training_bytes: int
    sts_dev: float
    sts_dev_before: float
    adapter_start: float
    chunks: str
    settings: dict[str, Any]
    machine: dict[str, Any]


# -- what both sides share ---------------------------------------------------------------------


def build_recipe(options: argparse.Namespace, folder: Path) -> Recipe:
    """The demo recipe with this comparison's settings."""
    _, overrides = choose_data(offline=True)
    if options.data is not None:
        overrides.append(f"data.sources={json.dumps([{'path': str(options.data)}])}")
    values = {
        "model.keep_layers": options.keep_layers,
        "lora.rank": options.rank,
        "lora.alpha": 2 * options.rank,
        "loss.mask_duplicates": False,
        "train.logical_batch": options.batch,
        "train.steps": options.steps,
        "train.learning_rate": options.learning_rate,
        "train.warmup_steps": options.steps // 10,
        "memory.token_budget": options.token_budget or "auto",
        "eval.limit": _QUICK_PAIRS if options.quick else None,
        "output.folder": str(folder),
        "output.name": "run",
    }
    overrides += [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return load_recipe("demo", overrides)


def ordered_rows(recipe: Recipe) -> list[TrainRow]:
    """The rows of all steps, in the order our trainer takes them."""
    sources, _ = corpus.read_sources(recipe.data, offline=True)
    weights = [source.weight for source in recipe.data.sources]
    batch = recipe.train.logical_batch
    order = RowOrder([len(rows) for rows in sources], weights, batch, recipe.train.seed)
    rows = [row for source in sources for row in source]
    steps = recipe.train.num_steps(order.steps_per_epoch * batch)
    return [rows[int(place)] for step in range(steps) for place in order.rows(step)]


def adapter_parameters(model: Any, part: str) -> list[torch.Tensor]:
    """The adapter's weights of one part, `lora_A` or `lora_B`."""
    return [weight for name, weight in model.named_parameters() if part in name]


def adapter_sum(model: Any) -> float:
    """A number that tells two fresh adapters apart."""
    return float(
        sum(float(w.detach().double().abs().sum()) for w in adapter_parameters(model, "lora_A"))
    )


def warm_up(encoder: Encoder, tokenizer: Any, recipe: Recipe, texts: Sequence[str]) -> None:
    """One small forward and backward pass, so that no side's first step pays for set-up."""
    store = tokenize(tokenizer, list(texts[:_WARM_UP_TEXTS]), query_format(recipe))
    with encoder.training_mode(step=0):
        emb_BD = encoder(pad(store, np.arange(len(store)), tokenizer.pad_token_id))
        torch.autograd.backward(emb_BD.sum())
    for parameter in encoder.model.parameters():
        parameter.grad = None


def score(encoder: Encoder, tokenizer: Any, recipe: Recipe) -> float:
    """Spearman on the recipe's first set, by our evaluator."""
    loaded = sets.load_set(recipe.eval.sets[0], sets.data_folder(), recipe.eval.limit, offline=True)
    text_format, budget = query_format(recipe), recipe.eval.token_budget
    return evaluate.score_set(encoder, tokenizer, loaded, text_format, budget).spearman


def measured(
    train: Callable[[], tuple[list[float], list[float]]],
    encoder: Encoder,
    tokenizer: Any,
    recipe: Recipe,
    chunks: str,
) -> SideResult:
    """Run `train`, which gives each step's seconds and loss, and measure around it."""
    device = encoder.device
    start = adapter_sum(encoder.model)
    warm_up(encoder, tokenizer, recipe, [row.anchor for row in ordered_rows(recipe)])
    loading_peak = peak_bytes(device)
    reset_peak(device)
    base = peak_bytes(device)  # a peak just reset is what is held now
    seconds, losses = train()
    training_peak = peak_bytes(device)
    after = score(encoder, tokenizer, recipe)
    with torch.no_grad():
        for weight in adapter_parameters(encoder.model, "lora_B"):
            weight.zero_()
    return SideResult(
        seconds=seconds,
        losses=losses,
        peak_bytes=max(loading_peak, training_peak),
        base_bytes=base,
        training_bytes=training_peak - base,
        sts_dev=after,
        sts_dev_before=score(encoder, tokenizer, recipe),
        adapter_start=start,
        chunks=chunks,
        settings=described(recipe, encoder),
        machine=machine(device),
    )


def described(recipe: Recipe, encoder: Encoder) -> dict[str, Any]:
    """The settings, for the JSON line."""
    dtype = encoder.model.dtype
    evaluated = recipe.eval.sets[0]
    pairs = "" if recipe.eval.limit is None else f", {recipe.eval.limit} pairs drawn once"
    return {
        "model": recipe.model.id,
        "quantization": recipe.model.quantization,
        "double_quantization": recipe.model.double_quantization,
        "autocast": "none" if dtype is None else dtype_name(dtype),
        "keep_layers": recipe.model.keep_layers,
        "lora": recipe.lora.model_dump(include={"rank", "alpha", "dropout", "targets"}),
        "max_tokens": recipe.text.max_tokens,
        "pooling": recipe.embedding.pooling,
        "temperature": recipe.loss.temperature,
        "mask_duplicates": recipe.loss.mask_duplicates,
        **recipe.train.model_dump(exclude={"epochs", "betas", "epsilon", "save_every"}),
        "data": Path(recipe.data.sources[0].path).name,
        "scored_by": f"lowmem_cft.evaluation.sts.score.score_set on {evaluated}{pairs}",
    }


# -- our side ------------------------------------------------------------------------------------


def run_ours(options: argparse.Namespace, folder: Path) -> SideResult:
    """Our trainer's own steps, without its evaluation, checkpoint and export."""
    recipe = build_recipe(options, folder)
    opened = runs.open_run(recipe, resume=False, overwrite=False)
    observer = Quiet(lambda text: say(f"ours: {text}"))
    job = assemble(recipe, observer, offline=True)
    trainer = Trainer(job, opened, observer)

    def train() -> tuple[list[float], list[float]]:
        seconds, losses = [], []
        for _ in range(job.num_steps):
            taken, line = timed(trainer.step, job.device)
            seconds.append(taken)
            losses.append(line.loss)
            say(f"ours: step {line.step}: loss {line.loss:.4f}, {seconds[-1]:.2f} s")
        return seconds, losses

    plan = trainer.plan.describe()
    return measured(train, job.encoder, job.backbone.tokenizer, recipe, plan)


# -- sentence-transformers' side -------------------------------------------------------------


def as_dataset(rows: Sequence[TrainRow]) -> Dataset:
    """anchor, positive, negative.. as columns; the order of columns is what their loss goes by.

    Raises:
        ValueError: the rows differ in how many negatives they have.
    """
    from datasets import Dataset

    counts = {len(row.negatives) for row in rows}
    if len(counts) > 1:
        raise ValueError("--data: every row needs the same number of negatives")
    columns = {"anchor": [row.anchor for row in rows], "positive": [row.positive for row in rows]}
    for k in range(counts.pop()):
        columns[f"negative_{k + 1}"] = [row.negatives[k] for row in rows]
    return Dataset.from_dict(columns)


def st_arguments(recipe: Recipe, dtype: torch.dtype, device: torch.device, folder: Path) -> Any:
    """Our training section in their words."""
    from sentence_transformers import SentenceTransformerTrainingArguments

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
        # `train_sampling_strategy` does not reach their sampler, which is random otherwise.
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    section, cuda = recipe.train, device.type == "cuda"
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=section.steps,
        per_device_train_batch_size=section.logical_batch,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=section.warmup_steps,
        optim="adamw_torch",
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        adam_epsilon=section.epsilon,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm or 0.0,
        seed=section.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16 and cuda,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        batch_sampler=in_order,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def step_timer(device: torch.device, seconds: list[float]) -> Any:
    """A callback that appends each step's seconds."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):  # type: ignore[misc]  # ships no types
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            seconds.append(time.perf_counter() - self.started)
            say(f"st: step {len(seconds)}: {seconds[-1]:.2f} s")

    return StepTimer()


def run_st(options: argparse.Namespace, folder: Path) -> SideResult:
    """The same through sentence-transformers' trainer and cached loss."""
    from sentence_transformers import SentenceTransformerTrainer

    device = choose_device()
    recipe = build_recipe(options, folder)
    dtype = choose_dtype(recipe.model.dtype, device)
    rows = ordered_rows(recipe)
    source = find_backbone(recipe.model, say)
    model = base_in_st(recipe.model, source, query_format(recipe), device, folder / "base")
    check_tokens(model, source.tokenizer, recipe, [row.anchor for row in rows[: options.batch]])
    add_adapter(model, recipe)
    seconds: list[float] = []
    losses: list[torch.Tensor] = []
    loss = cached_loss()(
        model,
        scale=1 / recipe.loss.temperature,
        mini_batch_size=options.mini_batch,
        mini_batch_num_tokens=options.mini_batch_tokens,
    )
    loss.register_forward_hook(lambda module, inputs, output: losses.append(output.detach()))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=st_arguments(recipe, dtype, device, folder),
        train_dataset=as_dataset(rows),
        loss=loss,
        callbacks=[step_timer(device, seconds)],
    )

    def train() -> tuple[list[float], list[float]]:
        trainer.train()
        return seconds, [float(value) for value in losses]

    encoder = encoder_around(model[0].auto_model, recipe)
    return measured(train, encoder, source.tokenizer, recipe, st_chunks(options))


def encoder_around(model: Any, recipe: Recipe) -> Encoder:
    """Embeds with a model that others train: no layer is changed to compute only what we read."""

    class WholeEncoder(Encoder):
        reads_one = reads_last = False

    section = recipe.embedding
    return WholeEncoder(model, pooling=section.pooling, normalize=section.normalize)


def st_chunks(options: argparse.Namespace) -> str:
    if options.mini_batch_tokens is not None:
        return f"mini_batch_num_tokens {options.mini_batch_tokens}"
    return f"mini_batch_size {options.mini_batch}, mini_batch_num_tokens off"


def run_side(options: argparse.Namespace, folder: Path) -> SideResult:
    """The side that `--side` names."""
    quiet_libraries()
    return (run_ours if options.side == "ours" else run_st)(options, folder)
