"""The loss's time taken apart: its own kernels, the library's products, tiles and registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from bench.device import elapsed_ms, release
from bench.gpu.checks import guarded
from bench.gpu.kernel_times import dearest, kernels_of
from bench.gpu.options import Options
from bench.harness import median, replaced, say
from lowmem_cft.machine import dtype_name
from lowmem_cft_kernels import ONE_WAY, SYMMETRIC, Candidates, Products, info_nce, tune
from lowmem_cft_kernels.tiles import LOADS, Tile, capability_of, tile_for

SIZES = {True: (64, 128, 32), False: (16384, 32768, 2304)}
"""M, N and D, by `tiny`."""

RECTANGLES = ((4096, 5760), (3712, 5632))
"""Rows and columns of the gradient's pieces: what the workspace gives, and what fills the waves of
a card of 132 multiprocessors."""

PRODUCTS = ("gemm", "cutlass", "nvjet", "xmma", "cublas", "addmm", "aten::mm", "aten::bmm")
"""Marks in the names of library kernels that multiply matrices."""

REGISTERS = 128
"""With these, two programs of 8 warps share a multiprocessor."""


def check(options: Options) -> dict[str, Any]:
    """The similarity pass and the products apart; products by rectangle; masked blocks by tile."""
    result: dict[str, Any] = {"ok": True}
    pieces: dict[str, Callable[[], dict[str, Any]]] = {
        "calls": partial(call_rates, options),
        "products": partial(product_rates, options),
        "tiles": partial(tile_times, options),
    }
    for name, work in pieces.items():
        result[name] = guarded(name, work)
        release()
        options.note(result)
    result["ok"] = all(result[name]["ok"] for name in pieces)
    return result


def call_rates(options: Options) -> dict[str, Any]:
    """Microseconds of one call's kernels, by what they are, and their rates.

    By dtype, workspace (the loss's own where none is named) and mode.
    """
    m, n, d = SIZES[options.tiny]
    device, draw = options.device, torch.Generator(options.device).manual_seed(0)
    vectors = [torch.randn(rows, d, generator=draw, device=device) for rows in (m, n)]
    query_MD, doc_ND = (F.normalize(x, dim=1) for x in vectors)
    candidates = Candidates(target=torch.arange(m, device=device))
    result: dict[str, Any] = {"ok": True, "m": m, "n": n, "d": d}
    exact, split = Products.EXACT, Products.SPLIT_BF16
    for dtype, products, mib in (
        (torch.float16, exact, 512),  # the trainer's, of normalised embeddings
        (torch.float16, exact, None),
        (torch.float32, split, 512),  # and of others
        (torch.bfloat16, exact, None),
    ):
        for mode, softmaxes in {"one_way": ONE_WAY, "symmetric": SYMMETRIC}.items():
            call = partial(
                info_nce,
                query_MD.to(dtype),
                doc_ND.to(dtype),
                candidates,
                temperature=0.05,
                softmaxes=softmaxes,
                products=products,
                workspace_bytes=None if mib is None else mib * 2**20,
            )
            name = split.value if products is split else dtype_name(dtype)
            name += "" if mib is None else f", {mib} MiB"
            result[f"{name}, {mode}"] = apart(kernels_of(call, device), m * n * d)
    return result


def apart(kernels: dict[str, tuple[int, float]], size: int) -> dict[str, Any]:
    """Microseconds of each kind of kernel; TFLOP/s of those that multiply.

    The kernels named lse and gradient compute all similarities once each; the products are two.
    """
    flops = {"lse_kernel": 2 * size, "gradient_kernel": 2 * size, "products": 4 * size}
    taken = dict.fromkeys((*flops, "scale_kernel", "others"), 0.0)
    for name, (_, microseconds) in kernels.items():
        ours = [kind for kind in taken if kind.endswith("_kernel") and name.startswith(kind)]
        product = any(mark in name.lower() for mark in PRODUCTS)
        taken[ours[0] if ours else "products" if product else "others"] += microseconds
    return {
        "microseconds": {kind: round(value, 1) for kind, value in taken.items()},
        "tflops": {
            kind: round(1e-6 * work / taken[kind], 3) for kind, work in flops.items() if taken[kind]
        },
        "kernels": dearest(kernels, 12),
    }


def product_rates(options: Options) -> dict[str, Any]:
    """out += G X and out += G' X for a rectangle G of bf16, summed in float32, as the loss does."""
    device, d = options.device, SIZES[options.tiny][2]
    result: dict[str, Any] = {"ok": True, "d": d, "tflops": {}}
    for rows, columns in ((64, 96),) if options.tiny else RECTANGLES:
        grad_RC, row_RD, col_CD = (
            torch.randn(shape, device=device, dtype=torch.bfloat16)
            for shape in ((rows, columns), (rows, d), (columns, d))
        )
        for name, left, right in (("rows", grad_RC, col_CD), ("columns", grad_RC.T, row_RD)):
            out = torch.zeros(len(left), d, device=device)
            work = partial(add_product, out, left, right)
            work()
            ms = median([elapsed_ms(work, device) for _ in range(9)]) if options.cuda else None
            rate = None if ms is None else round(2e-9 * rows * columns * d / ms, 1)
            result["tflops"][f"{rows}x{columns}, {name}"] = rate
    return result


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out += left @ right, with float32 sums."""
    if out.is_cuda:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(left.float(), right.float())


def tile_times(options: Options) -> dict[str, Any]:
    """Milliseconds of calls by how the similarity pass is launched: registers, and larger tiles."""
    if not options.cuda:
        return {"ok": True, "skipped": "tiles are timed on CUDA"}
    capability, size = capability_of(options.device), (8192, 16384, 2304)
    entries = ("lse-16-plain", "lse-16-middle")
    timer = tune.CallTimer(options.device, tune.present_tiles(capability, entries), repeats=3)
    plain, middle, heavy = (tile_for(capability, "lse", 16, load) for load in LOADS)
    trials = [(entries[0], plain, None), (entries[0], plain, REGISTERS)]
    trials += [(entries[1], tile, None) for tile in dict.fromkeys((middle, heavy))]
    result: dict[str, Any] = {"ok": True, "size": size, "trials": []}
    for entry, tile, registers in trials:
        if options.left < 8:
            say("  no time left for more tiles")
            break
        row: dict[str, Any] = {"entry": entry, "tile": asdict(tile), "maxnreg": registers}
        try:
            with at_most_registers(registers):
                row["ms"] = round(timer(entry, tile, size), 3)
        except tune.NOT_REFUSALS:
            raise
        except tune.REFUSALS as error:
            row["refused"] = f"{type(error).__name__}: {str(error)[:200]}"
        result["trials"].append(row)
    return result


@contextmanager
def at_most_registers(count: int | None) -> Iterator[None]:
    """Kernels are compiled for so many registers a thread: more of them share a multiprocessor."""
    options = Tile.options
    limit = {} if count is None else {"maxnreg": count}
    with replaced(Tile, "options", lambda tile: options(tile) | limit):
        yield
