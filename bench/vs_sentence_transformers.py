"""This trainer beside sentence-transformers' cached contrastive loss, on the same work.

    python bench/vs_sentence_transformers.py            # about 8 minutes on two CPU cores
    python bench/vs_sentence_transformers.py --quick    # does it run; its figures mean nothing

Both sides train the same 4-bit base and LoRA from the same start on the same batches in the same
order, with the same loss, optimizer, schedule and arithmetic. Theirs goes through
SentenceTransformerTrainer and CachedMultipleNegativesRankingLoss. Each side of each run has a
process of its own; the sides take turns at going first. Standard output is one line of JSON:

ours, st         triplets_per_s: trained rows by the summed time of the steps. Loading and reading
                 are not in it, nor is tokenising: ours is done once before training, theirs
                 between the steps.
                 peak_bytes: the process's peak until training ended, loading included (resident
                 memory; allocated device memory on CUDA). base_bytes: what was held when training
                 began (libraries, model, allocator slack); training_bytes: how far its peak rose
                 above that.
                 sts_dev: Spearman after training, by our evaluator on either side's weights;
                 sts_dev_before: the same with the adapter set back to where it started.
                 first_loss, last_loss: of the first and last step.
speedup          ours by theirs, triplets per second; above 1 is faster
memory_ratio     ours by theirs, peak_bytes; below 1 is less. training_memory_ratio: the same of
                 training_bytes.
comparable       the first losses agree within 2 %, both adapters started the same. If false, the
                 sides did not do the same work, standard error says so and the exit code is 1.

Duplicates of a positive are not masked here, since their loss does not mask them. Theirs takes
`--mini-batch` texts at a time, by default as many as is its own default: on a CPU its token budget
(`--mini-batch-tokens`) and larger mini-batches were slower and took more memory. Ours takes the
chunks it finds to fit, or `--token-budget`. On a GPU memory means little unless those two are
chosen to match. On a CPU the machine must be idle: a second busy process slows two threads that
wait for each other by far more than its share.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import machine, median, print_line, reset_peak, run_fresh, synchronize, versions

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from lowmem_cft.data.rows import TrainRow
    from lowmem_cft.model.encoder import Encoder
    from lowmem_cft.recipe.schema import Recipe

MAX_DIFFERENCE = 0.02
"""Relative difference of the first losses up to which both sides are said to do the same."""

_WARM_UP_TEXTS = 32
_QUICK = {"steps": 3, "batch": 32, "keep_layers": 4}
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


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- what both sides share, in their processes ------------------------------------------------


def build_recipe(options: argparse.Namespace, folder: Path) -> Recipe:
    """The demo recipe with this comparison's settings."""
    from lowmem_cft.recipe.load import load_recipe
    from lowmem_cft.training.demo import choose_data

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
    from lowmem_cft.data import corpus
    from lowmem_cft.data.batches import RowOrder

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
    import numpy as np
    import torch

    from lowmem_cft.data.chunks import pad
    from lowmem_cft.data.tokens import query_format, tokenize

    store = tokenize(tokenizer, list(texts[:_WARM_UP_TEXTS]), query_format(recipe))
    with encoder.training_mode(step=0):
        emb_BD = encoder(pad(store, np.arange(len(store)), tokenizer.pad_token_id))
        torch.autograd.backward(emb_BD.sum())
    for parameter in encoder.model.parameters():
        parameter.grad = None


def score(encoder: Encoder, tokenizer: Any, recipe: Recipe) -> float:
    """Spearman on the recipe's first set, by our evaluator."""
    from lowmem_cft.data.tokens import query_format
    from lowmem_cft.evaluation.sts import score as evaluate
    from lowmem_cft.evaluation.sts import sets

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
    import torch

    from lowmem_cft.machine import peak_bytes

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
        "autocast": "none" if dtype is None else str(dtype).removeprefix("torch."),
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
    from lowmem_cft.progress import Quiet
    from lowmem_cft.training import runs as run
    from lowmem_cft.training.job import assemble
    from lowmem_cft.training.trainer import Trainer

    recipe = build_recipe(options, folder)
    opened = run.open_run(recipe, resume=False, overwrite=False)
    observer = Quiet(lambda text: say(f"ours: {text}"))
    job = assemble(recipe, observer, offline=True)
    trainer = Trainer(job, opened, observer)

    def train() -> tuple[list[float], list[float]]:
        seconds, losses = [], []
        for _ in range(job.num_steps):
            synchronize(job.device)
            started = time.perf_counter()
            line = trainer.step()
            synchronize(job.device)
            seconds.append(time.perf_counter() - started)
            losses.append(line.loss)
            say(f"ours: step {line.step}: loss {line.loss:.4f}, {seconds[-1]:.2f} s")
        return seconds, losses

    plan = trainer.plan.describe()
    return measured(train, job.encoder, job.backbone.tokenizer, recipe, plan)


# -- sentence-transformers' side -------------------------------------------------------------


def lay_out(base: Path, tokenizer: Any, folder: Path) -> None:
    """A model folder with the base's weights and the given tokenizer, so without chat template."""
    folder.mkdir()
    for file in base.iterdir():
        if file.name == "config.json" or "safetensors" in file.name:
            (folder / file.name).symlink_to(file.resolve())
    tokenizer.save_pretrained(folder)


def load_st(recipe: Recipe, device: torch.device, folder: Path) -> tuple[SentenceTransformer, Any]:
    """The same base in sentence-transformers, and the base's own tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BitsAndBytesConfig

    from lowmem_cft.data.tokens import overhead, query_format
    from lowmem_cft.exporting.tokenizer import prepared_tokenizer
    from lowmem_cft.machine import choose_dtype
    from lowmem_cft.model import backbone, configs, sources
    from lowmem_cft.model.precision import keep_weight_layout

    section, text_format = recipe.model, query_format(recipe)
    name = sources.resolve(section.id, section.revision, say)
    tokenizer = backbone.load_tokenizer(name, section.revision)
    lay_out(Path(name), prepared_tokenizer(tokenizer, text_format), folder)
    dtype = choose_dtype(section.dtype, device)
    quantization = backbone.quantization_kwargs(section, dtype)
    quantization.pop("quant_method")
    config = configs.load_config(section, name)
    cut = ("num_hidden_layers", "layer_types", "scale_depth")
    model_kwargs = {"dtype": dtype, "quantization_config": BitsAndBytesConfig(**quantization)}
    if device.type == "cuda":
        model_kwargs["device_map"] = {"": device}
    transformer = Transformer(
        str(folder),
        max_seq_length=overhead(tokenizer, text_format) + text_format.max_tokens,
        model_kwargs=model_kwargs,
        config_kwargs={key: getattr(config, key) for key in cut if hasattr(config, key)},
    )
    # The similarity normalises, so a Normalize module would only be work done twice.
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device=str(device))
    model[0].auto_model.requires_grad_(False)
    keep_weight_layout(model)
    return model, tokenizer


def add_adapter(model: SentenceTransformer, recipe: Recipe) -> None:
    """Our adapter's configuration and start, through their `add_adapter`."""
    import torch
    from peft import LoraConfig

    from lowmem_cft.model.adapter import target_modules

    section = recipe.lora
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=target_modules(model[0].auto_model, section.targets),
        bias="none",
        task_type="FEATURE_EXTRACTION",
    )
    torch.manual_seed(recipe.train.seed)
    model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_tokens(
    model: SentenceTransformer, tokenizer: Any, recipe: Recipe, texts: Sequence[str]
) -> None:
    """Both sides see the same token ids.

    Raises:
        RuntimeError: they do not.
    """
    from lowmem_cft.data.tokens import query_format, tokenize

    store = tokenize(tokenizer, list(texts), query_format(recipe))
    theirs = model.preprocess(list(texts))
    for i, text in enumerate(texts):
        ids = theirs["input_ids"][i][theirs["attention_mask"][i].bool()].tolist()
        if ids != store[i].tolist():
            raise RuntimeError(f"other tokens for {text!r}: {store[i].tolist()}, theirs {ids}")


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
    import torch
    from sentence_transformers import SentenceTransformerTrainingArguments
    from torch.utils.data import BatchSampler, SequentialSampler

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


def st_loss(model: SentenceTransformer, recipe: Recipe, options: argparse.Namespace) -> Any:
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    return CachedMultipleNegativesRankingLoss(
        model,
        scale=1 / recipe.loss.temperature,
        mini_batch_size=options.mini_batch,
        mini_batch_num_tokens=options.mini_batch_tokens,
    )


def run_st(options: argparse.Namespace, folder: Path) -> SideResult:
    """The same through sentence-transformers' trainer and cached loss."""
    from sentence_transformers import SentenceTransformerTrainer

    from lowmem_cft.machine import choose_device, choose_dtype

    device = choose_device()
    recipe = build_recipe(options, folder)
    dtype = choose_dtype(recipe.model.dtype, device)
    rows = ordered_rows(recipe)
    model, tokenizer = load_st(recipe, device, folder / "base")
    check_tokens(model, tokenizer, recipe, [row.anchor for row in rows[: options.batch]])
    add_adapter(model, recipe)
    seconds: list[float] = []
    losses: list[torch.Tensor] = []
    loss = st_loss(model, recipe, options)
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
    return measured(train, encoder, tokenizer, recipe, st_chunks(options))


def encoder_around(model: Any, recipe: Recipe) -> Encoder:
    """Embeds with a model that others train: no layer is changed to compute only what we read."""
    from lowmem_cft.model.encoder import Encoder

    class WholeEncoder(Encoder):
        reads_last = False

    section = recipe.embedding
    return WholeEncoder(model, pooling=section.pooling, normalize=section.normalize)


def st_chunks(options: argparse.Namespace) -> str:
    if options.mini_batch_tokens is not None:
        return f"mini_batch_num_tokens {options.mini_batch_tokens}"
    return f"mini_batch_size {options.mini_batch}, mini_batch_num_tokens off"


# -- the process that compares ------------------------------------------------------------------


def summary(results: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """One side over its runs: medians."""

    def middle(key: str) -> float:
        return median([result[key] for result in results])

    speeds = [batch * len(result["seconds"]) / sum(result["seconds"]) for result in results]
    return {
        "triplets_per_s": round(median(speeds), 3),
        "step_s": round(median([s for result in results for s in result["seconds"]]), 4),
        "peak_bytes": int(middle("peak_bytes")),
        "base_bytes": int(middle("base_bytes")),
        "training_bytes": int(middle("training_bytes")),
        "sts_dev": round(middle("sts_dev"), 5),
        "sts_dev_before": round(middle("sts_dev_before"), 5),
        "first_loss": round(median([result["losses"][0] for result in results]), 5),
        "last_loss": round(median([result["losses"][-1] for result in results]), 5),
        "chunks": results[0]["chunks"],
    }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Why these two runs are not the same work; empty if they are."""
    found = []
    first, other = ours["losses"][0], theirs["losses"][0]
    if not abs(first - other) <= MAX_DIFFERENCE * abs(first):
        found.append(f"first losses {first:.5f} and {other:.5f}")
    start, other = ours["adapter_start"], theirs["adapter_start"]
    if not abs(start - other) <= 1e-6 * start:
        found.append(f"the adapters' starts (sums {start:.6f} and {other:.6f})")
    if ours["settings"] != theirs["settings"]:
        found.append(f"settings {ours['settings']} and {theirs['settings']}")
    return found


def compare(options: argparse.Namespace, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """All runs of both sides, as the JSON line's values, and what makes them incomparable."""
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "st": []}
    for index in range(options.runs):
        sides = list(results) if index % 2 == 0 else list(results)[::-1]
        for side in sides:
            say(f"run {index + 1} of {options.runs}: {side}")
            results[side].append(run_fresh(Path(__file__), [*argv, "--side", side]))
    pairs = zip(results["ours"], results["st"], strict=True)
    wrong = [text for ours, theirs in pairs for text in differences(ours, theirs)]
    ours, st = (summary(results[side], options.batch) for side in results)
    first = results["ours"][0]
    return {
        "benchmark": "vs_sentence_transformers",
        "ours": ours,
        "st": st,
        "speedup": round(ours["triplets_per_s"] / st["triplets_per_s"], 3),
        "memory_ratio": round(ours["peak_bytes"] / st["peak_bytes"], 3),
        "training_memory_ratio": round(ours["training_bytes"] / max(st["training_bytes"], 1), 3),
        "comparable": not wrong,
        "runs": options.runs,
        "settings": first["settings"],
        "machine": first["machine"],
        "versions": versions(),
    }, wrong


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Options, with what `--quick` makes of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=20)
    add("--batch", type=int, default=128, help="rows of a step (default: %(default)s)")
    add("--keep-layers", type=int, default=10, help="lowest layers kept (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-3)
    add("--rank", type=int, default=8, help="of LoRA; alpha is twice it (default: %(default)s)")
    add("--runs", type=int, default=1, help="of each side; medians are given")
    add("--mini-batch", type=int, default=32, help="theirs: texts at a time (default: %(default)s)")
    add("--mini-batch-tokens", type=int, help="theirs: tokens at a time instead")
    add("--token-budget", type=int, help="ours: padded tokens at a time (default: what fits)")
    add("--data", type=Path, help="triplets (default: $LOWMEM_CFT_DATA's, else the embedded)")
    add("--quick", action="store_true", help="tiny: to see that it runs")
    add("--side", choices=["ours", "st"], help=argparse.SUPPRESS)
    add("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(_QUICK)
    for name in ("steps", "batch", "runs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: wanted at least 1")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if options.side is not None:
        from lowmem_cft.model.backbone import quiet_libraries

        quiet_libraries()
        run_side = run_ours if options.side == "ours" else run_st
        with tempfile.TemporaryDirectory() as folder:
            result = run_side(options, Path(folder))
        options.result.write_text(json.dumps(asdict(result)), encoding="utf-8")
        return 0
    try:
        values, wrong = compare(options, argv)
    except RuntimeError as error:  # its own process has said why
        say(str(error))
        return 1
    say(f"first loss: ours {values['ours']['first_loss']}, st {values['st']['first_loss']}")
    for text in wrong:
        say(f"!!! NOT THE SAME WORK, DO NOT USE THE FIGURES: the sides differ in {text}")
    print_line(values)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
