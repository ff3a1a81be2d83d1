"""What the loss holds beyond inputs and gradients, against a bound."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from bench.device import Peak, capped, release, timed
from bench.gpu.checks import guarded
from bench.gpu.options import Options, context_bytes
from bench.loss.cases import BOUNDS, MODES, Size, exact_gradients, make_task, relative_error
from lowmem_cft_kernels import GTE, ONE_WAY, SYMMETRIC, Candidates, InfoNCEResult, info_nce

EXTRA_BYTES = 64 * 2**20
"""What the loss may hold beyond inputs and gradients."""

SOFTMAXES = {"one_way": ONE_WAY, "symmetric": SYMMETRIC, "gte": GTE}
LARGEST = ((65536, 131072, 2304), "one_way", "bfloat16")
MEMORY_CASES: dict[bool, tuple[tuple[Size, str, str], ...]] = {
    True: (((64, 128, 32), "one_way", "float32"), ((48, 96, 40), "gte", "bfloat16")),
    False: (
        ((1000, 3001, 2304), "symmetric", "bfloat16"),
        ((4096, 8192, 768), "one_way", "float32"),
        ((16384, 16384, 768), "gte", "bfloat16"),
        ((16384, 32768, 2304), "symmetric", "bfloat16"),
        ((16384, 32768, 2304), "one_way", "bfloat16"),  # one pass; the largest takes two
        LARGEST,
    ),
}
"""Size, mode and dtype of each case, by `tiny`."""


def check(options: Options) -> dict[str, Any]:
    """What the loss holds beyond inputs and gradients, up to the largest batch under the cap."""
    result: dict[str, Any] = {"ok": True, "bound_bytes": EXTRA_BYTES, "cases": []}
    for size, mode, dtype in MEMORY_CASES[options.tiny]:
        name = f"{'x'.join(map(str, size))}, {dtype}, {mode}"
        if options.left < 5:
            result["cases"].append({"case": name, "ok": False, "error": "no time left"})
            continue
        entry = guarded(name, partial(measure_extra, options, size, mode, dtype))
        result["cases"].append({"case": name, **entry})
        release()
        options.note(result)
    result["ok"] = all(entry["ok"] for entry in result["cases"])
    return result


def measure_extra(options: Options, size: Size, mode: str, dtype: str) -> dict[str, Any]:
    """One call under the cap, after one that compiles and fills cuBLAS's workspace."""
    device = options.device
    task = make_task(size, mode, getattr(torch, dtype), device, 0.05, False)
    release()
    wide = torch.promote_types(task.query_MD.dtype, torch.float32)
    out = tuple(torch.empty_like(x, dtype=wide) for x in (task.query_MD, task.doc_ND))
    candidates = Candidates(target=torch.arange(size[0], device=device))

    def call() -> InfoNCEResult:
        return info_nce(
            task.query_MD,
            task.doc_ND,
            candidates,
            temperature=task.temperature,
            softmaxes=SOFTMAXES[mode],
            out=(out[0], out[1]),
        )

    with capped(device, options.cap_bytes - context_bytes(options)):
        call()
        with Peak(device, [task.query_MD, task.doc_ND, *out, candidates.target]) as peak:
            seconds, result = timed(call, device)
    error = None
    if mode in MODES:
        pairs = zip(out, exact_gradients(task), strict=True)
        error = max(relative_error([x], exact) for x, exact in pairs)
    extra = peak.taken
    right = bool(result.loss.isfinite()) and all(bool(x.isfinite().all()) for x in out)
    right = right and (error is None or error <= BOUNDS[task.query_MD.dtype])
    return {
        "ok": right and extra <= EXTRA_BYTES,
        "path": result.path.value,
        "extra_bytes": extra,
        "held_bytes": peak.before,
        "reserved_bytes": peak.reserved,
        "seconds": round(seconds, 4),
        "tflops": round(6e-12 * math.prod(size) / seconds, 3),
        "max_rel_error": error,
    }
