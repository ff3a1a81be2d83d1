"""The GPU check's part that holds gradients, dropout and padding against what they should be."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.device import capped, release
from bench.gpu.checks import Checks
from bench.gpu.nf4 import no_nf4
from bench.gpu.options import Options
from bench.gpu.real_models import attach, build_base, nudge_adapter
from bench.gpu.small_models import (
    FAMILIES,
    POOLING,
    Batch,
    FailAt,
    Gradients,
    batch_for,
    greatest_error,
    make_batch,
    make_encoder,
    plans_for,
    small_config,
    summed_error,
)
from bench.harness import replaced, say
from lowmem_cft.data.chunks import pad
from lowmem_cft.gradient.oom import DoesNotFit
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.machine import dtype_name
from lowmem_cft.model.backbone import quiet_libraries
from lowmem_cft.model.dropout import DropoutClock, IdentityDropout
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.units import GIB
from lowmem_cft_kernels import info_nce
from lowmem_cft_kernels.dropout import identity_dropout, reference_dropout
from plain import PAD, STEP, plain_gradients, planned_gradients

_INJECTIONS = 5
"""Operations of a step at which memory is made to run out; a step takes a GPU's host a second."""


def check_plans(options: Options, checks: Checks, dtype: torch.dtype, bound: float) -> None:
    """Every plan's gradient, dropout on, is the plain one."""
    batch, kind = batch_for(options), f"plans in {dtype_name(dtype)}"
    for place, family in enumerate(FAMILIES):
        config = small_config(family, options.tiny, smooth=dtype != torch.float64)
        pooling = POOLING.get(family, "eos")
        encoder = make_encoder(config, dtype, options.device, pooling=pooling)
        plans, gradients = list(plans_for(batch).items()), {}
        for name, plan in plans[place % 3 :: 3] if options.tiny else plans:
            gradients[name], report = planned_gradients(encoder, batch, batch.texts, plan)
            checks.holds("plan left as it was", f"{family}, {name}", report.plan == plan)
        expected = plain_gradients(encoder, batch, batch.texts)
        for name, got in gradients.items():
            checks.at_most(kind, f"{family}, {name}", greatest_error(got, expected), bound)


def check_bfloat16(options: Options, checks: Checks) -> None:
    """Errors in bf16 by those of plain PyTorch in bf16: the bound is on their ratio."""
    batch, half = batch_for(options), torch.bfloat16
    plans = plans_for(batch)
    for family in FAMILIES:
        config = small_config(family, options.tiny)
        make = partial(make_encoder, config, device=options.device, round_to=half, dropout=0.1)
        expected = plain_gradients(make(dtype=torch.float64), batch, batch.texts)
        autocast = torch.autocast(options.device.type, half)
        error = summed_error(
            plain_gradients(make(dtype=half), batch, batch.texts, during=autocast), expected
        )
        encoder = make(dtype=half)
        for name in ("checkpointed",) if options.tiny else ("some kept", "checkpointed"):
            got, _ = planned_gradients(encoder, batch, batch.texts, plans[name])
            ratio = summed_error(got, expected) / error
            checks.at_most("bf16 error by plain's", f"{family}, {name}", ratio, 1.5)


def check_padding(options: Options, checks: Checks) -> None:
    """Padded left, right or not at all: the same embeddings, with dropout and without."""
    batch = batch_for(options)
    text_P = batch.texts.text_P
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for family in FAMILIES:
            encoder = make_encoder(small_config(family, options.tiny), dtype, options.device)
            left, right = (pad(batch.store, text_P, PAD, side) for side in ("left", "right"))
            alone = [pad(batch.store, text_P[i : i + 1], PAD) for i in range(len(text_P))]
            for mode in (nullcontext(), encoder.training_mode(STEP)):
                with torch.no_grad(), mode:
                    right_BD, left_BD = encoder(right), encoder(left)
                    each = [encoder(text, torch.tensor([i])) for i, text in enumerate(alone)]
                kind = f"padding in {dtype_name(dtype)}"
                for name, other_BD in {"left": left_BD, "none": torch.cat(each)}.items():
                    error = float((right_BD - other_BD).abs().max())
                    checks.at_most(kind, f"{family}, {name}", error, bound)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.cpu().contiguous().view(kind), b.cpu().contiguous().view(kind))


def check_dropout(options: Options, checks: Checks) -> None:
    """Keys, masks and results are the CPU reference's, bit for bit."""
    draw = torch.Generator().manual_seed(0)
    for num_tokens, num_features in ((1, 1), (37, 200), (515, 577)):
        modules = {}
        for device in (torch.device("cpu"), options.device):
            clock = DropoutClock(seed=3, step=9)
            modules[device] = IdentityDropout(0.1, "layer.q_proj", clock)
            place_B = torch.tensor([2**40 + 5], device=device)
            clock.set_chunk(place_B, torch.arange(num_tokens, device=device)[None])
        shape = f"{num_tokens} x {num_features}"
        host, there = (modules[d].keys(num_features) for d in (torch.device("cpu"), options.device))
        for own, other in zip(host, there, strict=True):
            checks.holds("dropout keys", shape, same_bits(own, other))
        masks = [module.keep_mask(num_features).cpu() for module in modules.values()]
        checks.holds("dropout masks", shape, torch.equal(masks[0], masks[-1]))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x_LF = torch.randn(num_features, num_tokens, generator=draw).to(dtype).T
            for rate in (0.05, 0.5):
                expected = reference_dropout(x_LF, *host, rate)
                got = identity_dropout(x_LF.to(options.device), *there, rate)
                name = f"{shape}, {dtype_name(dtype)}, rate {rate}"
                checks.holds("dropout on the device", name, same_bits(got, expected))


def check_injected(options: Options, checks: Checks) -> None:
    """Memory that runs out at any operation changes the plan and not the gradient."""
    batch = batch_for(options)
    encoder = make_encoder(small_config("llama", True), torch.float64, options.device)
    plan = StepPlan(backward_tokens=batch.tokens // 3, forward_tokens=batch.tokens // 2)
    kept = replace(plan, kept_tokens=batch.tokens // 2, checkpoint_every=1)
    gradients: list[tuple[str, Gradients]] = []
    changed: set[str] = set()
    for plan_name, given in {"none kept": plan, "some kept": kept}.items():
        count = FailAt(0)
        planned_gradients(encoder, batch, batch.texts, given, during=count)
        for k in np.linspace(1, -count.left, _INJECTIONS).astype(int).tolist():
            name = f"{plan_name}, operation {k} of {-count.left}"
            try:
                got, report = planned_gradients(
                    encoder, batch, batch.texts, given, during=FailAt(k)
                )
            except DoesNotFit:  # right where a single text was in work
                continue
            gradients.append((name, got))
            checks.holds("plan took notice", name, report.plan != given)
            now = report.plan.to_json()
            changed |= {key for key, value in given.to_json().items() if value != now[key]}
    gradients.append(("loss", _failing_loss(encoder, batch, plan, changed)))
    expected = plain_gradients(encoder, batch, batch.texts)
    for name, got in gradients:
        checks.at_most("out of memory", name, greatest_error(got, expected), 1e-10)
    for key in ("forward_tokens", "backward_tokens", "kept_tokens", "workspace_bytes"):
        checks.holds("phases that ran out", key, key in changed)


def _failing_loss(encoder: Encoder, batch: Batch, plan: StepPlan, changed: set[str]) -> Gradients:
    from lowmem_cft.gradient import step

    real, fails = info_nce, [torch.OutOfMemoryError("CUDA out of memory: injected")]

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if fails:
            raise fails.pop()
        return result

    with replaced(step, "info_nce", failing):
        got, report = planned_gradients(encoder, batch, batch.texts, plan)
    if report.plan.workspace_bytes < plan.workspace_bytes:
        changed.add("workspace_bytes")
    return got


def check_real_out_of_memory(options: Options, checks: Checks) -> None:
    """The allocator itself refuses: CUDA only."""
    if not options.cuda:
        return
    config = small_config("llama", False, layers=4)
    config.hidden_size, config.intermediate_size = 512, 1024
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    batch = make_batch(128, 300, 40)
    encoder = make_encoder(config, torch.float32, options.device)
    plan = StepPlan(backward_tokens=10**6, forward_tokens=10**6, kept_tokens=None)
    planned_gradients(encoder, batch, batch.texts, plan)  # cuBLAS takes its workspace
    release()
    reserved = torch.cuda.memory_reserved(options.device)
    torch.cuda.reset_peak_memory_stats(options.device)
    expected, _ = planned_gradients(encoder, batch, batch.texts, plan)
    rise = torch.cuda.max_memory_reserved(options.device) - reserved
    release()
    room = reserved + int(0.4 * rise)
    with capped(options.device, room):
        got, report = planned_gradients(encoder, batch, batch.texts, plan)
    say(f"  {rise / GIB:.2f} GiB wanted, 40 % given: {report.plan.describe()}")
    checks.holds("plan took notice", "of the allocator", report.plan != plan)
    checks.at_most("out of memory, real", "float32", greatest_error(got, expected), 1e-5)


def check_repeatable(options: Options, checks: Checks) -> None:
    """The same step twice: the same bits."""
    batch = batch_for(options)
    for dtype in (torch.float32, torch.bfloat16):
        for family in FAMILIES[:1] if options.tiny else FAMILIES:
            encoder = make_encoder(small_config(family, options.tiny), dtype, options.device)
            plan = plans_for(batch)["checkpointed"]
            first, report = planned_gradients(encoder, batch, batch.texts, plan)
            second, again = planned_gradients(encoder, batch, batch.texts, plan)
            same = all(torch.equal(first[name], second[name]) for name in first)
            name = f"{family}, {dtype_name(dtype)}"
            checks.holds("second run", name, same and torch.equal(report.loss, again.loss))


def check_nf4(options: Options, checks: Checks) -> None:
    """Plans on 4-bit weights equal the plain step on the same ones."""
    reason = no_nf4(options)
    if reason is not None:
        return checks.skips("nf4", reason)
    batch = batch_for(options)
    for family in FAMILIES:
        recipe = load_recipe("demo", ["lora.dropout=0.1", "embedding.pooling=last"])
        config = small_config(family, options.tiny)
        torch.manual_seed(0)
        base = build_base(config, recipe, torch.float32, options.device)
        encoder = attach(base, recipe)
        nudge_adapter(encoder)
        names = ("checkpointed",) if options.tiny else ("some kept", "checkpointed")
        plans = [plans_for(batch)[name] for name in names]
        gradients = [planned_gradients(encoder, batch, batch.texts, plan)[0] for plan in plans]
        expected = plain_gradients(encoder, batch, batch.texts)
        for got in gradients:
            checks.at_most("plans on nf4", family, greatest_error(got, expected), 1e-5)
    return None


def check(options: Options) -> dict[str, Any]:
    """All groups of checks."""
    quiet_libraries()
    checks = Checks(options)
    plans = check_plans
    checks.group("dropout", check_dropout)
    checks.group("nf4", check_nf4)
    checks.group("padding", check_padding)
    checks.group("repeatable", check_repeatable)
    checks.group("real out of memory", check_real_out_of_memory)
    checks.group("injected out of memory", check_injected)
    checks.group("bf16", check_bfloat16)
    checks.group("float32", lambda o, c: plans(o, c, torch.float32, 1e-5))
    checks.group("float64", lambda o, c: plans(o, c, torch.float64, 1e-10))
    return checks.to_json()
