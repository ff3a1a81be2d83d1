"""Steps of models of real size on batches like NLI's: what they take beside what was predicted."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.device import Peak, synchronize
from bench.gpu.facts import OnCard
from bench.gpu.kernel_times import profiled
from bench.gpu.options import MODELS, Options
from bench.gpu.phases import PhaseClock, Sample, watched
from bench.gpu.real_models import attach, build_base, config_for, weight_bytes
from bench.gpu.small_models import Batch
from lowmem_cft.data.batches import RowTable, step_texts
from lowmem_cft.data.chunks import pad
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient.step import ContrastiveStep, StepReport
from lowmem_cft.machine import choose_dtype
from lowmem_cft.model.adapter import set_checkpointing, trainable_parameters
from lowmem_cft.model.attention import chosen_backends
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.prediction import SLACK, BatchShape, Prediction
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import MemorySection, Recipe
from lowmem_cft.training.optimizer import make_optimizer
from lowmem_cft.units import GIB
from plain import STEP

RATES = ("seconds_by_phase", "tokens_per_s", "tflops", "share_of_matrix_peak")
"""Keys of a step that its time decides."""

_CHUNK = (128, 16)
"""Texts and tokens of each of the chunk that is profiled."""


class DoesNotFit(ValueError):
    """The model alone takes more than there is."""


@dataclass
class Rig:
    """One model ready for steps.

    `limit_bytes`: for everything, as the trainer would plan. `peak_flops`: of the device, per second.
    """

    options: Options
    recipe: Recipe
    planner: Planner
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    limit_bytes: int
    peak_flops: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        return trainable_parameters(self.encoder.model)

    def held_bytes(self) -> int:
        """Weights, adapter and optimizer, counted."""
        states = (s for state in self.optimizer.state.values() for s in state.values())
        moments = sum(s.nbytes for s in states if isinstance(s, Tensor))
        return (
            sum(weight_bytes(self.encoder.model))
            + moments
            + sum(parameter.nbytes for parameter in self.parameters)
        )

    def choose(self, rows: int) -> Prediction:
        """The plan under the limit; a tiny model's limit is where 60 % of what it wants fits.

        Raises:
            ValueError: no plan fits.
        """
        lengths = nli_lengths(3 * rows)
        shape = BatchShape(rows, 3, int(lengths.max()), lengths)
        limit = self.limit_bytes
        if self.options.tiny:
            whole = self.planner.choose(MemorySection(), shape, 2**50).peak_bytes
            fixed = sum(self.planner.fixed_parts().values())
            limit = fixed + int(0.6 * (whole - fixed))
        return self.planner.choose(MemorySection(), shape, limit)


def make_rig(
    name: str, options: Options, quantization: str, limit_bytes: int, peak_flops: float
) -> Rig:
    """Build the model and its planner.

    Raises:
        DoesNotFit: it does not fit before any text.
    """
    preset, overrides = MODELS[name]
    recipe = load_recipe(preset, [*overrides, f"model.quantization={quantization}"])
    dtype = choose_dtype("auto", options.device) if options.cuda else torch.float32
    config = config_for(name, recipe, options.tiny)
    longest = int(nli_lengths(10).max())
    planner = Planner(Footprint(recipe, config, dtype, longest, options.device.type))
    fixed = sum(planner.fixed_parts().values())
    if fixed > limit_bytes:
        raise DoesNotFit(f"does not fit: {fixed / GIB:.2f} GiB before any text")
    torch.manual_seed(0)
    encoder = attach(build_base(config, recipe, dtype, options.device), recipe)
    optimizer = make_optimizer(trainable_parameters(encoder.model), recipe.train, options.device)
    return Rig(options, recipe, planner, encoder, optimizer, limit_bytes, peak_flops)


# -- batches ---------------------------------------------------------------------------------------


def nli_lengths(num_texts: int, seed: int = 0) -> Any:
    """int64 (num_texts,): mean 14, most up to 40, one in 200 has 150."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(np.round(draw.gamma(2.6, 5.2, size=num_texts)), 4, 40).astype(np.int64)
    lengths[:: min(200, max(1, num_texts // 2))] = 150
    return lengths


def nli_batch(rows: int, vocabulary: int, recipe: Recipe) -> Batch:
    """Triplets of random tokens, no text twice."""
    lengths = nli_lengths(3 * rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.random.default_rng(1).integers(4, vocabulary, size=offsets[-1]).astype(np.int32)
    places = np.random.default_rng(2).permutation(3 * rows)
    table = RowTable(places[:rows], places[rows : 2 * rows], places[2 * rows :, None])
    texts = step_texts(
        table,
        np.arange(rows),
        hard_negatives=recipe.loss.hard_negatives,
        mask_duplicates=recipe.loss.mask_duplicates,
        encode_twins_once=recipe.lora.dropout == 0,
    )
    return Batch(TokenStore(ids, offsets), texts)


# -- one step --------------------------------------------------------------------------------------


def run_step(
    rig: Rig, rows: int, predicted: Prediction, every: int = 1, *, emptied: bool = True
) -> dict[str, Any]:
    """One step and what it took; see check.py for the keys.

    Args:
        every: of the chunks whose graphs are not kept, so many-th go through the model.
        emptied: the allocator starts with nothing, see `Peak`.
    """
    vocabulary = int(rig.planner.footprint.config.vocab_size)
    batch = nli_batch(rows, vocabulary, rig.recipe)
    model, device = rig.encoder.model, rig.options.device
    set_checkpointing(model, predicted.plan.checkpoint_every)
    rig.optimizer.zero_grad(set_to_none=True)
    clock, sample = PhaseClock(device), Sample(every, predicted.plan)
    weights = [*model.parameters(), *model.buffers()]
    others = rig.options.ballast.used_bytes if rig.options.ballast else 0
    with (
        OnCard(device, others) as card,
        Peak(device, weights, rig.held_bytes(), emptied) as peak,
        rig.encoder.training_mode(STEP),
        chosen_backends(),
    ):
        start = time.perf_counter()
        with watched(rig.encoder, clock, sample, batch.texts.place_S) as encoder:
            step = ContrastiveStep(
                encoder, batch.store, 0, rig.recipe.loss, rig.parameters, rig.planner.chunk_cost
            )
            report = step(batch.texts, predicted.plan)
        seconds = time.perf_counter() - start
    norm = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in rig.parameters if p.grad is not None))
    clock.enter("optimizer")
    rig.optimizer.step()
    clock.enter("")
    rig.optimizer.zero_grad(set_to_none=True)
    ran_out = report.plan != predicted.plan or card.counts["num_ooms"] > 0
    finite = bool(report.loss.isfinite()) and math.isfinite(norm) and norm > 0
    return {
        "ok": finite and not ran_out,
        "rows": rows,
        "texts": report.texts,
        "plan": predicted.plan.to_json(),
        "relative_cost": round(predicted.relative_cost, 3),
        **time_taken(rig, predicted, report, sample, clock, seconds),
        "loss": float(report.loss),
        "finite": finite,
        "ran_out": ran_out,
        **({"plan_after": report.plan.to_json()} if report.plan != predicted.plan else {}),
        **memory_taken(rig, predicted, peak),
        "card_bytes": card.card_bytes,
        **card.counts,
    }


def time_taken(
    rig: Rig,
    predicted: Prediction,
    report: StepReport,
    sample: Sample,
    clock: PhaseClock,
    seconds: float,
) -> dict[str, Any]:
    """Seconds and rates; of the whole step, where it was not all computed by arithmetic."""
    phases = {name: taken for name, taken in clock.seconds.items() if name != "optimizer"}
    sampled = sample.share < 1
    whole = sample.whole(phases) if sampled else seconds
    return {
        "seconds": round(seconds, 3),
        "sampled": sampled,
        "share": round(sample.share, 5),
        "seconds_whole": round(whole, 3),
        "seconds_by_phase": {name: round(taken, 4) for name, taken in clock.seconds.items()},
        "tokens": report.tokens,
        "tokens_per_s": round(report.tokens / whole),
        "padding_share": round(sample.padded_tokens / report.tokens - 1, 3),
        "tflops": round(predicted.flops / whole / 1e12, 3),
        "share_of_matrix_peak": round(predicted.flops / whole / rig.peak_flops, 4),
    }


def memory_taken(rig: Rig, predicted: Prediction, peak: Peak) -> dict[str, Any]:
    """Predicted beside measured."""
    parts, total = predicted.parts, predicted.peak_bytes
    fixed = rig.planner.fixed_parts()
    added = total - sum(fixed.values()) - parts["slack"]
    added += parts["gradients"] if "backward" in predicted.moment else 0
    return {
        "limit_bytes": rig.limit_bytes,
        "predicted_bytes": total,
        "predicted_parts": parts,
        "moment": predicted.moment,
        "before_bytes": peak.before,
        "allocated_bytes": peak.allocated,
        "reserved_bytes": peak.reserved,
        "ratio": round((total - parts["context"] - parts["slack"]) / peak.allocated, 4),
        "ratio_reserved": round((total - parts["context"]) / peak.reserved, 4),
        "ratio_step": round(added / max(1, peak.taken), 4),
    }


# -- how large a step ------------------------------------------------------------------------------


def largest_fitting(rig: Rig, rows: int) -> tuple[int, Prediction]:
    """The number of rows and its plan; where they do not fit, the half, the quarter and so on.

    Raises:
        ValueError: not even one fits.
    """
    try:
        return rows, rig.choose(rows)
    except ValueError:
        if rows == 1:
            raise
    return largest_fitting(rig, rows // 2)


def one_in(
    first: dict[str, Any], small: Prediction, large: Prediction, rows: int, seconds: float
) -> int:
    """How many chunks one computed chunk stands for, so that the step takes at most `seconds`.

    Args:
        first: what the small step took.
        seconds: for the large step of `rows` triplets; the loss is always of all of them.
    """
    phases = first["seconds_by_phase"]
    loss_s: float = phases.get("loss", 0.0) * (rows / first["rows"]) ** 2
    passes: float = large.relative_cost * large.padded_tokens
    passes /= small.relative_cost * small.padded_tokens
    expected: float = (first["seconds"] - phases.get("loss", 0.0)) * passes
    if loss_s + expected <= seconds:
        return 1
    return max(2, math.ceil(expected / max(0.05 * seconds, seconds - loss_s)))


# -- one chunk -------------------------------------------------------------------------------------


def fits_unchecked(rig: Rig, tokens: int) -> bool:
    """A chunk without checkpoints, beside what every step holds."""
    taken = (1 + SLACK) * rig.planner.chunk(tokens, 0).backward_bytes
    return sum(rig.planner.fixed_parts().values()) + taken <= rig.limit_bytes


def profile_chunk(rig: Rig) -> dict[str, Any]:
    """The dearest kernels of one chunk of 2,048 tokens, or fewer, forward and backward."""
    texts, width = (8, 16) if rig.options.tiny else _CHUNK
    while texts > 1 and not fits_unchecked(rig, texts * width):
        texts //= 2
    offsets = np.arange(texts + 1) * width
    vocabulary = int(rig.planner.footprint.config.vocab_size)
    ids = np.random.default_rng(3).integers(4, vocabulary, size=offsets[-1]).astype(np.int32)
    chunk = pad(TokenStore(ids, offsets), np.arange(texts), 0)
    set_checkpointing(rig.encoder.model, 0)

    def work() -> None:
        emb_BD = rig.encoder(chunk)
        torch.autograd.grad(emb_BD.sum(), rig.parameters, allow_unused=True)

    with rig.encoder.training_mode(STEP), chosen_backends():
        work()
        kernels = profiled(work, rig.options.device)
    synchronize(rig.options.device)
    return {"texts": texts, "tokens": texts * width, **kernels}
