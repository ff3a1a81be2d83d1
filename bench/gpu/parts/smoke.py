"""The GPU check's first part: whether the machine computes at all what the others take for granted.

A sample of everything, in seconds; it ends at the first thing that does not hold. It needs torch and
triton, and looks at 4-bit weights where bitsandbytes is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.device import Peak, release, seconds_of
from bench.gpu.checks import Checks, Stopped
from bench.gpu.loss_cases import Shape
from bench.gpu.nf4 import four_bit, no_nf4
from bench.gpu.options import Options, bf16_peak
from bench.gpu.parts.loss_correctness import (
    SPLIT,
    Finding,
    Findings,
    Task,
    add_findings,
    can_split,
    num_workers,
    started,
)
from bench.harness import say
from lowmem_cft.machine import AMPERE, dtype_name
from lowmem_cft.model.attention import (
    AttentionCall,
    SeenBackends,
    backend_for,
    backward_bytes,
    chosen_backends,
)
from lowmem_cft_kernels import LossPath

LOSSES = (
    "plain",
    "symmetric keys weights",
    "symmetric own keys weights row-margins ignored strided",
)
"""Sets of options: one way, symmetric, with a bound per row, and on vectors with gaps."""

ATTENTION_TEXTS, ATTENTION_WIDTH = 512, 4
ATTENTION = AttentionCall(num_heads=36, num_kv_heads=36, head_dim=64)
"""MiniCPM-2B's, on a chunk of 2,048 tokens of the shortest texts."""

_ATTENTION_BOUND = 0.05
_NF4_BOUND = 3.0
"""A kernel that does not round the weights to 16 bits differs from one that does by as much again."""


def check(options: Options) -> dict[str, Any]:
    """The device's speed, 4-bit weights, attention and the loss."""
    checks, facts = Checks(options, stop=True), device_speed(options)
    options.note(facts)
    tasks = loss_tasks(options)
    try:
        # processes compile the loss's kernels while the rest is looked at here
        with started(tasks, num_workers(options)) as waiting:
            checks.group("nf4", check_nf4)
            checks.group("attention", partial(check_attention, facts))
            of_results: dict[Task, Findings] = {
                task: partial(results_alone, waiting[task]) for task in tasks
            }
            checks.group("loss", partial(add_findings, tasks, of_results))
    except Stopped:
        say("  the smoke test ends here")
    return facts | {"nf4": checks.skipped.get("nf4")} | checks.to_json()


def device_speed(options: Options) -> dict[str, Any]:
    """What the device gives at best."""
    numel = 2**30 if options.cuda and not options.tiny else 2**22
    source, target = (torch.zeros(numel, dtype=torch.uint8, device=options.device) for _ in "ab")
    copy_s = seconds_of(partial(target.copy_, source), 10, options.device)
    del source, target
    release()
    return {
        "matrix_tflops": round(bf16_peak(options) / 1e12, 3),
        "copy_gbps": round(2 * numel / copy_s / 1e9, 1),
    }


def training_dtype(options: Options) -> torch.dtype:
    """The dtype that a recipe which leaves it open takes on such a GPU; float32 on a CPU."""
    if not options.cuda:
        return torch.float32
    newer = torch.cuda.get_device_capability(options.device) >= AMPERE
    return torch.bfloat16 if newer else torch.float16


# -- 4-bit weights ---------------------------------------------------------------------------------


def check_nf4(options: Options, checks: Checks) -> None:
    """A layer's result and its backward are products with the weights that it stands for.

    bitsandbytes multiplies few rows by a kernel of its own, and many after de-quantising.
    """
    reason = no_nf4(options)
    if reason is not None:
        if "ModuleNotFoundError" not in reason:
            raise RuntimeError(reason)
        return checks.skips("nf4", reason + "; carry it along as bench/README.md says")
    dtype = training_dtype(options)
    size = (96, 64) if options.tiny else (5760, 2304)
    bare = nn.Linear(size[1], size[0], bias=False, device="meta")
    layer = four_bit(bare, dtype, True, options.device)
    for rows in (8, 40) if options.tiny else (64, 2048):
        for name, ratio in _product_errors(layer, rows, dtype).items():
            checks.at_most(
                "nf4: error by a plain product's", f"{name}, {rows} rows", ratio, _NF4_BOUND
            )
    return None


def _product_errors(layer: Any, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """Errors of result and gradient, by those of a plain product in the same dtype."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.weight
    plain_OI = dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    x_RI, grad_RO = (
        torch.randn(rows, n, device=plain_OI.device, dtype=dtype) for n in plain_OI.T.shape
    )

    def both(multiply: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = multiply(leaf)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad)]

    exact = both(lambda x: x @ plain_OI.double().T, x_RI.double(), grad_RO.double())
    eager = both(lambda x: x @ plain_OI.T, x_RI, grad_RO)
    got = both(layer, x_RI, grad_RO)
    return {
        name: float((g.double() - w).norm() / (e.double() - w).norm())
        for name, g, e, w in zip(("result", "gradient"), got, eager, exact, strict=True)
    }


# -- attention -------------------------------------------------------------------------------------


def check_attention(facts: dict[str, Any], options: Options, checks: Checks) -> None:
    """The backend is the one that the planner reckons with, and so are its backward's bytes."""
    texts = 8 if options.tiny else ATTENTION_TEXTS
    dtype = training_dtype(options)
    capability = torch.cuda.get_device_capability(options.device) if options.cuda else None
    entry: dict[str, Any] = {
        "shape": [texts, ATTENTION_WIDTH, ATTENTION.num_heads, ATTENTION.head_dim],
        "dtype": dtype_name(dtype),
    }
    facts["attention"] = [entry]
    with chosen_backends():
        backward = attention_backward(ATTENTION, texts, ATTENTION_WIDTH, dtype, options.device)
        with SeenBackends() as seen:
            gradients = backward()
        entry["backends"] = seen.names
        finite = all(bool(x.isfinite().all()) for x in gradients)
        checks.holds("attention: finite gradients", str(entry["shape"]), finite)
        del gradients
        if capability is None:  # the CPU's kernel holds nothing, which no one can see
            return
        backend = backend_for(ATTENTION, dtype, capability)
        formula_bytes = backward_bytes(ATTENTION, texts, ATTENTION_WIDTH, dtype, backend)
        entry |= {
            "formula_bytes": formula_bytes,
            "backward_bytes": extra_bytes(backward, options.device),
        }
    checks.holds("attention: the backend", backend.value, entry["backends"] == [backend.value])
    off = abs(entry["backward_bytes"] - formula_bytes) / max(formula_bytes, 2**20)
    checks.at_most("attention: the backward's bytes", backend.value, off, _ATTENTION_BOUND)


def attention_backward(
    call: AttentionCall, texts: int, width: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """One causal forward and backward, which gives the gradients of queries, keys and values."""

    def heads(count: int) -> Tensor:
        x = torch.randn(texts, width, count, call.head_dim, device=device, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()

    leaves = heads(call.num_heads), heads(call.num_kv_heads), heads(call.num_kv_heads)
    grad = torch.randn_like(leaves[0])

    def work() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return torch.autograd.grad(out, leaves, grad)

    return work


def extra_bytes(backward: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int:
    """Most that the call allocates beside what it gives, after one that does not count."""
    backward()
    with Peak(device, emptied=False) as peak:
        results = backward()
    out_bytes = results[0].nbytes  # of the forward, which the backward still needs
    return peak.taken - sum(x.nbytes for x in results) - out_bytes


# -- the loss --------------------------------------------------------------------------------------


def loss_tasks(options: Options) -> list[Task]:
    """Each set of options in each dtype, by the path that the trainer takes here, at ragged sizes."""
    shape: Shape = (37, 53, 40) if options.tiny else (129, 259, 2304)
    path = LossPath.TRITON if options.cuda else LossPath.CHUNKED
    dtypes = ["float32", "float16"]
    if not options.cuda or training_dtype(options) == torch.bfloat16:
        dtypes.append("bfloat16")
    device = str(options.device)
    ways = [(name, dtype) for dtype in dtypes for name in LOSSES]
    ways += [(name, SPLIT) for name in LOSSES if can_split(name, options)]
    return [(name, dtype, path.value, (shape,), device) for name, dtype in ways]


def results_alone(findings: Findings, seconds: float) -> list[Finding]:
    """Findings on the loss and its gradients: what is only observed need not stop the rest."""
    kinds = ("loss: value", "loss: d_")
    return [finding for finding in findings(seconds) if finding[0].startswith(kinds)]
