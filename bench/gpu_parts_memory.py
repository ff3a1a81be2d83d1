"""The GPU check's part that puts real models under a cap of memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpu_options import (
    MODELS,
    Options,
    Peak,
    capped,
    context_bytes,
    guarded,
    matrix_peak,
    release,
    say,
)
from gpu_real_models import (
    attach,
    build_base,
    config_for,
    make_recipe,
    no_nf4,
    weight_bytes,
)
from gpu_small_models import STEP, Batch
from lowmem_cft.backbone import (
    choose_dtype,
    quiet_libraries,
    set_checkpointing,
    trainable_parameters,
)
from lowmem_cft.batches import RowTable, step_texts
from lowmem_cft.encoder import Encoder
from lowmem_cft.footprint import Footprint
from lowmem_cft.optimizer import make_optimizer
from lowmem_cft.planner import GIB, MARGINS, BatchShape, Planner, Prediction
from lowmem_cft.recipe import MemorySection, Recipe
from lowmem_cft.step import ContrastiveStep
from lowmem_cft.tokens import TokenStore
from lowmem_cft_kernels import Candidates, info_nce
from measure import synchronize

_LOSS_SECONDS = 30.0
"""Kept of the part's time for the loss phase."""


class DoesNotFit(ValueError):
    """The model alone takes more than the cap."""


@dataclass
class Rig:
    """One model ready for steps. `peak_flops`: of the device, per second."""

    options: Options
    recipe: Recipe
    planner: Planner
    encoder: Encoder
    optimizer: torch.optim.Optimizer
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

    def choose(self, rows: int, lengths: Any) -> Prediction:
        """The plan under the cap; a tiny model's cap is where 60 % of what it wants fits."""
        shape = BatchShape(rows, 3, int(lengths.max()), lengths)
        limit = self.options.cap_bytes
        if self.options.tiny:
            whole = self.planner.choose(MemorySection(), shape, 2**50).peak_bytes
            fixed = sum(self.planner.fixed_parts().values())
            limit = fixed + int(0.6 * (whole - fixed))
        return self.planner.choose(MemorySection(), shape, limit)


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


def run_step(rig: Rig, rows: int, found: Prediction) -> dict[str, Any]:
    """One step and what it took; see the module for the keys."""
    vocabulary = int(rig.planner.footprint.config.vocab_size)
    batch = nli_batch(rows, vocabulary, rig.recipe)
    model, device = rig.encoder.model, rig.options.device
    set_checkpointing(model, found.plan.checkpoint_every)
    step = ContrastiveStep(
        rig.encoder, batch.store, 0, rig.recipe.loss, rig.parameters, rig.planner.chunk_cost
    )
    rig.optimizer.zero_grad(set_to_none=True)
    weights = [*model.parameters(), *model.buffers()]
    with Peak(rig.options, weights, rig.held_bytes()) as peak, rig.encoder.training_mode(STEP):
        start = time.perf_counter()
        report = step(batch.texts, found.plan)
        synchronize(device)
        seconds = time.perf_counter() - start
    norm = math.sqrt(sum(float(p.grad.norm()) ** 2 for p in rig.parameters if p.grad is not None))
    finite = bool(report.loss.isfinite()) and math.isfinite(norm) and norm > 0
    rig.optimizer.step()
    rig.optimizer.zero_grad(set_to_none=True)
    ran_out = report.plan != found.plan
    flops = found.flops / seconds
    entry: dict[str, Any] = {
        "rows": rows,
        "texts": report.texts,
        "plan": found.plan.to_json(),
        "relative_cost": round(found.relative_cost, 3),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(report.tokens / seconds),
        "padding_share": round(report.padding_share, 3),
        "tflops": round(flops / 1e12, 3),
        "share_of_matrix_peak": round(flops / rig.peak_flops, 4),
        "loss": float(report.loss),
        "finite": finite,
        "ran_out": ran_out,
        **memory_found(rig, found, peak),
    }
    if ran_out:
        entry["plan_after"] = report.plan.to_json()
    entry["ok"] = finite and not ran_out and entry["within_cap"]
    return entry


def memory_found(rig: Rig, found: Prediction, peak: Peak) -> dict[str, Any]:
    """Predicted beside measured."""
    parts, total = found.parts, found.peak_bytes
    fixed = rig.planner.fixed_parts()
    added = total - sum(fixed.values()) - parts["slack"]
    added += parts["gradients"] if "backward" in found.moment else 0
    room = rig.options.cap_bytes - MARGINS["cuda"]
    return {
        "predicted_bytes": total,
        "predicted_parts": parts,
        "moment": found.moment,
        "before_bytes": peak.before,
        "allocated_bytes": peak.allocated,
        "reserved_bytes": peak.reserved,
        "ratio": round((total - parts["context"] - parts["slack"]) / peak.allocated, 4),
        "ratio_reserved": round((total - parts["context"]) / peak.reserved, 4),
        "ratio_step": round(added / max(1, peak.allocated - peak.before), 4),
        "context_bytes": context_bytes(rig.options),
        "within_cap": not rig.options.cuda or peak.reserved <= room,
    }


def make_rig(name: str, options: Options, quantization: str, peak_flops: float) -> Rig:
    """Build the model and its planner."""
    preset, overrides = MODELS[name]
    recipe = make_recipe(preset, [*overrides, f"model.quantization={quantization}"])
    on_cpu = not options.cuda
    dtype = torch.float32 if on_cpu else choose_dtype("auto", options.device)
    config = config_for(name, recipe, options.tiny)
    longest = int(nli_lengths(10).max())
    planner = Planner(Footprint(recipe, config, dtype, longest, options.device.type))
    fixed = sum(planner.fixed_parts().values())
    if fixed > options.cap_bytes:
        raise DoesNotFit(f"does not fit: {fixed / GIB:.2f} GiB before any text")
    torch.manual_seed(0)
    encoder = attach(build_base(config, recipe, dtype, options.device), recipe)
    optimizer = make_optimizer(trainable_parameters(encoder.model), recipe.train, options.device)
    return Rig(options, recipe, planner, encoder, optimizer, peak_flops)


def largest_rows(rig: Rig, first: dict[str, Any], found: Prediction, seconds: float) -> int:
    """The largest power of two whose step takes at most so long, by the time of the first."""
    most, rows = 256 if rig.options.tiny else 65536, int(first["rows"])
    passes = found.relative_cost * found.padded_tokens
    while 2 * rows <= most:
        try:
            larger = rig.choose(2 * rows, nli_lengths(3 * 2 * rows))
        except ValueError:  # does not fit
            break
        expected = first["seconds"] * larger.relative_cost * larger.padded_tokens / passes
        if expected > seconds:
            break
        rows *= 2
    return rows


def try_model(
    name: str, options: Options, quantization: str, peak_flops: float, seconds: float
) -> dict[str, Any]:
    """Build one model, warm it up, measure a small step and the largest one there is time for.

    Args:
        seconds: for all of it.
    """
    start = time.perf_counter()
    if options.cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
    try:
        rig = make_rig(name, options, quantization, peak_flops)
    except DoesNotFit as error:
        if quantization == "nf4":
            raise
        return {"ok": True, "quantization": quantization, "skipped": f"in 16 bit it {error}"}
    base, weights = rig.encoder.model, rig.planner.footprint.weights
    quantized, plain = weight_bytes(base)
    result: dict[str, Any] = {
        "ok": False,
        "quantization": quantization,
        "lora": rig.recipe.lora.model_dump(),
        "build_s": round(time.perf_counter() - start, 1),
        "weights": {
            "quantized_bytes": [quantized, weights.quantized_bytes],
            "plain_bytes": [plain, weights.plain_bytes],
            "num_trained": [sum(p.numel() for p in rig.parameters), weights.num_trained],
        },
        "steps": [],
    }
    if options.cuda:
        result["build_peak_bytes"] = torch.cuda.max_memory_allocated(options.device)
    rows = 32 if options.tiny else 1024
    found = rig.choose(rows, nli_lengths(3 * rows))
    shape = BatchShape(rows, 3, rig.planner.footprint.longest)
    most = rig.planner.max_rows(MemorySection(), shape, options.cap_bytes)
    result["max_logical_batch"] = most
    result["plan_s"] = round(time.perf_counter() - start - result["build_s"], 1)
    result["warm_up_s"] = run_step(rig, rows, found)["seconds"]
    first = run_step(rig, rows, found)
    result["steps"].append(first)
    left = seconds - (time.perf_counter() - start)
    larger = largest_rows(rig, first, found, min(options.step_seconds, max(1.0, 0.8 * left)))
    if larger > rows:
        found = rig.choose(larger, nli_lengths(3 * larger))
        result["steps"].append(run_step(rig, larger, found))
    result["ok"] = all(step["ok"] for step in result["steps"])
    return result


def loss_flops(rows: int, dim: int) -> float:
    """Of the loss phase of so many triplets."""
    return 6.0 * rows * 2 * rows * dim


def measure_loss(options: Options, rows: int, dim: int, workspace_bytes: int) -> dict[str, Any]:
    """The loss phase alone: so many triplets' random embeddings, and the gradient of all of them."""
    slots, device = 3 * rows, options.device
    with Peak(options) as peak:
        emb_SD = torch.randn(slots, dim, device=device)
        emb_SD /= emb_SD.norm(dim=1, keepdim=True)
        d_emb_SD = torch.empty_like(emb_SD)
        key_N = torch.arange(2 * rows, device=device)
        candidates = Candidates(target=key_N[:rows], query_keys=key_N[:rows], doc_keys=key_N)
        synchronize(device)
        start = time.perf_counter()
        result = info_nce(
            emb_SD[:rows],
            emb_SD[rows:],
            candidates,
            temperature=0.05,
            workspace_bytes=workspace_bytes,
            out=(d_emb_SD[:rows], d_emb_SD[rows:]),
        )
        synchronize(device)
        seconds = time.perf_counter() - start
    taken = peak.allocated - peak.before
    return {
        "rows": rows,
        "dim": dim,
        "workspace_bytes": workspace_bytes,
        "seconds": round(seconds, 3),
        "tflops": round(1e-12 * loss_flops(rows, dim) / seconds, 6),
        "loss": float(result.loss),
        "embedding_bytes": emb_SD.nbytes,
        "gradient_bytes": d_emb_SD.nbytes,
        "allocated_bytes": taken,
        "beside_them_bytes": taken - emb_SD.nbytes - d_emb_SD.nbytes,
        "matrix_bytes": 4 * rows * 2 * rows,
        "ok": bool(result.loss.isfinite()) and bool(d_emb_SD.isfinite().all()),
    }


def check_memory(options: Options) -> dict[str, Any]:
    """Real models under the cap, and the loss on a batch larger than there is time to encode."""
    found: dict[str, Any] = {"ok": True, "cap_bytes": options.cap_bytes, "models": {}}
    quiet_libraries()
    reason = no_nf4(options)
    quantization = "nf4" if reason is None else "none"
    if reason is not None:
        say(f"  16-bit weights in the place of 4-bit ones: {reason}")
        found["no_nf4"] = reason
    peak_flops = matrix_peak(options)
    found["matrix_tflops"] = round(peak_flops / 1e12, 3)
    release()
    found["context_bytes"] = context_bytes(options)
    options = without_excess(options, found["context_bytes"])
    with capped(options, options.cap_bytes - MARGINS["cuda"]):
        for place, name in enumerate(options.models):
            left = options.left - (0 if options.tiny else _LOSS_SECONDS)
            seconds = left / (len(options.models) - place)
            if left < (1 if options.tiny else 30):
                found["models"][name] = {"ok": True, "skipped": "no time left"}
                continue
            found["models"][name] = guarded(
                name, partial(try_model, name, options, quantization, peak_flops, seconds)
            )
            release()
            options.note(found)
        found["loss_phase"] = _loss_phases(options, found)
    entries = [*found["loss_phase"], *found["models"].values()]
    found["ok"] = all(entry["ok"] for entry in entries)
    return found


def without_excess(options: Options, context: int) -> Options:
    """The cap less what the context takes beyond the planner's allowance for it.

    A large card's context takes more than that of a card which has no more than the cap.
    """
    return replace(options, cap_bytes=options.cap_bytes - max(0, context - MARGINS["cuda"]))


def _loss_phases(options: Options, so_far: Mapping[str, Any]) -> list[dict[str, Any]]:
    """65,536 triplets of MiniCPM-2B's embeddings and of LLaMA-8B's, in two workspaces.

    A small one compiles the kernels and another tells the speed: what would take longer than is
    left is not begun.
    """
    rows = 512 if options.tiny else 65536
    found: list[dict[str, Any]] = []
    small = partial(measure_loss, options, rows // 16, 64 if options.tiny else 2304, 2**25)
    guarded("loss, to compile", small)
    tflops = guarded("loss, small", small).get("tflops", 0.0)
    for dim, workspace_bytes in ((2304, 2**25), (4096, 2**25), (4096, 2**29)):
        dim = 64 if options.tiny else dim
        seconds = 1e-12 * loss_flops(rows, dim) / tflops if tflops else 0.0
        if seconds > options.left - 3:
            skipped = f"would take {seconds:.0f} s, there are {options.left:.0f}"
            found.append({"ok": True, "dim": dim, "skipped": skipped})
        else:
            work = partial(measure_loss, options, rows, dim, workspace_bytes)
            found.append(guarded(f"loss, {dim}", work))
            tflops = found[-1].get("tflops", tflops)
        options.note({**so_far, "loss_phase": found})
    return found
