"""The GPU check's part that trains real models on a card made small by a ballast."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.device import Peak, release, timed
from bench.gpu.checks import guarded
from bench.gpu.facts import nvidia_smi
from bench.gpu.nf4 import no_nf4
from bench.gpu.options import Options, bf16_peak
from bench.gpu.real_models import weight_bytes
from bench.gpu.steps import (
    RATES,
    DoesNotFit,
    Rig,
    largest_fitting,
    make_rig,
    one_in,
    profile_chunk,
    run_step,
)
from bench.harness import say
from lowmem_cft.model.attention import SeenBackends
from lowmem_cft.model.backbone import quiet_libraries
from lowmem_cft.planning.limits import free_limit
from lowmem_cft.planning.prediction import BatchShape
from lowmem_cft.recipe.schema import MemorySection
from lowmem_cft_kernels import Candidates, info_nce

_MODEL_SECONDS = 45.0
"""With less no model is begun."""

_READING_SECONDS = 5.0
"""Kept of the time for a step: for its plan, its batch and writing it down."""

_SPARSEST = 64
"""One of more chunks is no sample: first allocations would be most of its time."""

_STRIP = 4096
"""Rows that are drawn at a time."""

_SURE = 0.9
"""Share of the time that a step is expected to take at most: it is expected from a small one."""


def check(options: Options) -> dict[str, Any]:
    """Real models beside the ballast, and the loss on as many rows."""
    quiet_libraries()
    reason = no_nf4(options)
    quantization = "nf4" if reason is None else "none"
    result: dict[str, Any] = {"ok": True, "ballast": None, "no_nf4": reason, "models": {}}
    if reason is not None:
        say(f"  16-bit weights in the place of 4-bit ones: {reason}")
    if options.ballast is not None:
        result["ballast"] = asdict(options.ballast)
        say(f"  ballast: {result['ballast']}")
    peak_flops = bf16_peak(options)
    release()
    limit_bytes = plan_limit(options)
    result |= {"matrix_tflops": round(peak_flops / 1e12, 3), "limit_bytes": limit_bytes}
    for name in options.models:
        if options.left < (1 if options.tiny else _MODEL_SECONDS):
            result["models"][name] = {"ok": True, "skipped": "no time left"}
            continue
        work = partial(try_model, name, options, quantization, limit_bytes, peak_flops)
        result["models"][name] = guarded(name, work)
        release()
        options.note(result)
    result["nvidia_smi_used_mib"] = nvidia_smi("memory.used")
    result["loss_phase"] = loss_phases(options, result)
    entries = [*result["loss_phase"], *result["models"].values()]
    result["ok"] = all(entry["ok"] for entry in entries)
    return result


def plan_limit(options: Options) -> int:
    """Bytes for everything, as the trainer reckons where its recipe leaves them open."""
    if not options.cuda:
        return options.cap_bytes
    return free_limit(options.device)


def try_model(
    name: str, options: Options, quantization: str, limit_bytes: int, peak_flops: float
) -> dict[str, Any]:
    """Build one model, warm it up, look into a chunk, measure a small step and a large one."""
    start = time.perf_counter()
    if options.cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
    try:
        rig = make_rig(name, options, quantization, limit_bytes, peak_flops)
    except DoesNotFit as error:
        if quantization == "nf4":
            raise
        return {"ok": True, "quantization": quantization, "skipped": f"in 16 bit it {error}"}
    result: dict[str, Any] = {
        "ok": False,
        "quantization": quantization,
        "lora": rig.recipe.lora.model_dump(),
        "build_s": round(time.perf_counter() - start, 1),
        "weights": weights_found(rig),
        "steps": [],
    }
    if options.cuda:
        result["build_peak_bytes"] = torch.cuda.max_memory_allocated(options.device)
    measure_steps(rig, result)
    result["ok"] = all(step["ok"] for step in result["steps"])
    return result


def weights_found(rig: Rig) -> dict[str, list[int]]:
    """Measured beside the planner's."""
    quantized, plain = weight_bytes(rig.encoder.model)
    weights = rig.planner.footprint.weights
    return {
        "quantized_bytes": [quantized, weights.quantized_bytes],
        "plain_bytes": [plain, weights.plain_bytes],
        "num_trained": [sum(p.numel() for p in rig.parameters), weights.num_trained],
    }


def measure_steps(rig: Rig, result: dict[str, Any]) -> None:
    """A step that warms up, a small one, and one of the wanted rows, whole or a sample of it."""
    options, start = rig.options, time.perf_counter()
    rows = 32 if options.tiny else 1024
    small_rows, small = largest_fitting(rig, rows)
    shape = BatchShape(rows, 3, rig.planner.footprint.longest)
    result["max_logical_batch"] = rig.planner.max_rows(MemorySection(), shape, rig.limit_bytes)
    result["plan_s"] = round(time.perf_counter() - start, 1)
    with SeenBackends() as seen:
        result["warm_up_s"] = run_step(rig, small_rows, small)["seconds"]
    result["attention_backends"] = seen.names
    result["chunk_profile"] = profile_chunk(rig)
    first = run_step(rig, small_rows, small)
    again = run_step(rig, small_rows, small, emptied=False)
    first |= {key: again[key] for key in ("seconds", "seconds_whole", *RATES)}
    result["steps"].append(first)
    large_rows, large = largest_fitting(rig, 64 if options.tiny else options.rows)
    if large_rows <= small_rows:
        return
    options.note({"in_work": result})  # if the step takes longer than it should
    seconds = max(1.0, _SURE * (options.left - _READING_SECONDS))
    if options.step_seconds is not None:
        seconds = min(seconds, options.step_seconds)
    every = one_in(first, small, large, large_rows, seconds)
    if every > _SPARSEST:
        result["skipped"] = f"{large_rows} rows: only one of {every} chunks in {seconds:.0f} s"
        return
    part = "whole" if every == 1 else f"one of {every} chunks"
    say(f"  {large_rows} rows in up to {seconds:.0f} s: {part}, {large.plan.describe()}")
    result["steps"].append(run_step(rig, large_rows, large, every))


# -- the loss alone --------------------------------------------------------------------------------


def loss_flops(rows: int, dim: int) -> float:
    """Operations of the loss phase of so many triplets."""
    return 6.0 * rows * 2 * rows * dim


def measure_loss(options: Options, rows: int, dim: int, workspace_bytes: int) -> dict[str, Any]:
    """The loss phase alone: so many triplets' random embeddings, and the gradient of all of them."""
    slots, device = 3 * rows, options.device
    dtype = torch.float16 if options.cuda else torch.float32  # the trainer's, of unit vectors
    with Peak(device) as peak:
        emb_SD = unit_vectors(slots, dim, dtype, device)
        d_emb_SD = torch.empty_like(emb_SD, dtype=torch.float32)
        key_N = torch.arange(2 * rows, device=device)
        candidates = Candidates(target=key_N[:rows], query_keys=key_N[:rows], doc_keys=key_N)
        loss = partial(
            info_nce,
            emb_SD[:rows],
            emb_SD[rows:],
            candidates,
            temperature=0.05,
            workspace_bytes=workspace_bytes,
            out=(d_emb_SD[:rows], d_emb_SD[rows:]),
        )
        seconds, result = timed(loss, device)
    return {
        "rows": rows,
        "dim": dim,
        "workspace_bytes": workspace_bytes,
        "seconds": round(seconds, 3),
        "tflops": round(1e-12 * loss_flops(rows, dim) / seconds, 6),
        "loss": float(result.loss),
        "embedding_bytes": emb_SD.nbytes,
        "gradient_bytes": d_emb_SD.nbytes,
        "allocated_bytes": peak.taken,
        "beside_them_bytes": peak.taken - emb_SD.nbytes - d_emb_SD.nbytes,
        "matrix_bytes": 4 * rows * 2 * rows,
        "ok": bool(result.loss.isfinite()) and bool(d_emb_SD.isfinite().all()),
    }


def unit_vectors(count: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(count, dim), made strip by strip: float32 ones of all of them would be most of the peak."""
    emb_SD = torch.empty(count, dim, dtype=dtype, device=device)
    for strip in torch.split(emb_SD, _STRIP):
        strip.copy_(F.normalize(torch.randn(strip.shape, device=device), dim=1))
    return emb_SD


def loss_phases(options: Options, so_far: Mapping[str, Any]) -> list[dict[str, Any]]:
    """65,536 triplets of MiniCPM-2B's embeddings and of LLaMA-8B's, in two workspaces.

    A small one compiles the kernels and another tells the speed: what would take longer than is
    left is not begun.
    """
    rows = 512 if options.tiny else 65536
    phases: list[dict[str, Any]] = []
    if options.left < 10 and not options.tiny:
        return [{"ok": True, "skipped": "no time left"}]
    small = partial(measure_loss, options, rows // 16, 64 if options.tiny else 2304, 2**25)
    guarded("loss, to compile", small)
    tflops = guarded("loss, small", small).get("tflops", 0.0)
    for dim, workspace_bytes in ((2304, 2**25), (4096, 2**25), (4096, 2**29)):
        dim = 64 if options.tiny else dim
        seconds = 1e-12 * loss_flops(rows, dim) / tflops if tflops else 0.0
        if seconds > options.left - 3:
            skipped = f"would take {seconds:.0f} s, there are {options.left:.0f}"
            phases.append({"ok": True, "dim": dim, "skipped": skipped})
        else:
            work = partial(measure_loss, options, rows, dim, workspace_bytes)
            phases.append(guarded(f"loss, {dim}", work))
            tflops = phases[-1].get("tflops", tflops)
        options.note({**so_far, "loss_phase": phases})
    return phases
