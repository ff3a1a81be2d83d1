"""All that a CUDA GPU is needed for, in one command of under 8 minutes. Nothing is downloaded.

    python bench/gpu_check.py --out auto          # also to bench/results/
    python bench/gpu_check.py --only memory --cap 8GiB
    python bench/gpu_check.py --tiny              # every branch the machine can run, in a minute

Each part has a process and a time budget of its own, so that none takes the others with it; what a
part has found is written to `--out` when it ends, whole or not. Progress goes to standard error. The
last line of standard output is one line of JSON:

ok, seconds, parts, machine, versions, options.  parts: name -> ok, seconds, error if it failed, and

device        matrix_tflops: bf16 on a large product. copy_gbps: read and written. total_bytes.
correctness   num_checks; failed: the checks that did not hold, each with value and bound; worst: the
              greatest value of each kind of check with its bound; groups: seconds of each group.
              Gradients of every plan are held against one plain full-batch backward on the same
              device (peft's own layers): float64 to 1e-10, float32 to 1e-5, bf16 by the error of
              plain PyTorch under autocast against float64, at most 1.5 times.
memory        models: name -> weights (measured bytes beside the planner's), build_peak_bytes,
              max_logical_batch (by the planner), steps. Each of steps: rows, plan, moment, seconds,
              tokens_per_s (real tokens), tflops (the planner's operations over the time),
              share_of_matrix_peak, predicted_bytes (all, context included), allocated_bytes and
              reserved_bytes (most of the process's tensors and of its allocator), ran_out (memory
              ran out and the step went on with plan_after), within_cap. ratio: predicted without
              context and slack by allocated; ratio_reserved: predicted without context by reserved;
              ratio_step: what the step adds to weights and optimizer, by the same without.
              loss_phase: the loss on that many random embeddings. context_bytes: on the device and
              not in the allocator. On a CPU live tensors are counted, and the cap is the planner's.
dropout_speed rows as of bench/dropout.py

Weights are random: memory and time do not depend on them. 4-bit ones are quantised matrix by matrix,
so that the 16-bit model never exists. Lengths are as of NLI sentences: mean 14, up to 40, some 150.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import (
    machine,
    median,
    print_line,
    run_limited,
    synchronize,
    versions,
    write_whole,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where nothing is installed
sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from lowmem_cft import recipe as recipes
from lowmem_cft.backbone import (
    attach_adapter,
    choose_dtype,
    keep_weight_layout,
    linear_names,
    quiet_libraries,
    set_checkpointing,
    trainable_parameters,
)
from lowmem_cft.batches import RowTable, StepTexts, step_texts
from lowmem_cft.configs import config_without_weights, disable_base_dropout
from lowmem_cft.dropout import DropoutClock, IdentityDropout
from lowmem_cft.encoder import Encoder
from lowmem_cft.footprint import Footprint
from lowmem_cft.live_bytes import LiveBytes
from lowmem_cft.oom import DoesNotFit
from lowmem_cft.optimizer import make_optimizer
from lowmem_cft.plan import StepPlan
from lowmem_cft.planner import GIB, MARGINS, BatchShape, Planner, Prediction
from lowmem_cft.recipe import LoraSection, LossSection, MemorySection, Recipe, parse_bytes
from lowmem_cft.step import ContrastiveStep, StepReport
from lowmem_cft.tokens import TokenStore, pad
from lowmem_cft.tracing import skeleton, with_layers
from lowmem_cft_kernels import Candidates, info_nce
from lowmem_cft_kernels.dropout import identity_dropout, reference_dropout
from lowmem_cft_kernels.reference import reference_loss

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("lowmem-cft", "torch", "triton", "transformers", "peft", "bitsandbytes", "numpy")

_STARTED = time.perf_counter()
_HARD_END = 470.0  # seconds after which even a part in work is ended


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


@dataclass
class Options:
    """What a part may ask.

    `seconds`: the part's budget, from `started` on. `step_seconds`: most that one measured step
    should take. `result`: where `note` writes what the part has so far.
    """

    device: torch.device
    tiny: bool
    cap_bytes: int
    seconds: float
    step_seconds: float = 25.0
    models: tuple[str, ...] = ()
    result: Path | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.started)

    def note(self, found: Mapping[str, Any]) -> None:
        if self.result is not None:
            write_whole(self.result, {**found, "unfinished": True})


def release() -> None:
    """Give freed device memory back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def capped(options: Options, cap_bytes: int) -> Iterator[None]:
    """The process limited to so many bytes on the GPU, its context included; elsewhere nothing."""
    if not options.cuda:
        yield
        return
    total = torch.cuda.get_device_properties(options.device).total_memory
    share = min(1.0, max(0, cap_bytes - MARGINS["cuda"]) / total)
    torch.cuda.set_per_process_memory_fraction(share, options.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, options.device)


# -- the device -------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median of so many runs after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return median(found[1:])


def matrix_peak(options: Options) -> float:
    """FLOP/s of a large bf16 product."""
    size = 8192 if options.cuda and not options.tiny else 512
    a, b = (torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b, 10, options.device)


def check_device(options: Options) -> dict[str, Any]:
    """What the device gives at best."""
    numel = 2**30 if options.cuda and not options.tiny else 2**22
    source, target = (torch.zeros(numel, dtype=torch.uint8, device=options.device) for _ in "ab")
    copy_s = seconds_of(lambda: target.copy_(source), 10, options.device)
    found: dict[str, Any] = {
        "matrix_tflops": round(matrix_peak(options) / 1e12, 3),
        "copy_gbps": round(2 * numel / copy_s / 1e9, 1),
    }
    if options.cuda:
        properties = torch.cuda.get_device_properties(options.device)
        found["total_bytes"] = properties.total_memory
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["triton"] = versions(("triton",)).get("triton")
    return found


# -- correctness: tools -----------------------------------------------------------------------


class Checks:
    """What was found beside what was wanted."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.count = 0
        self.failed: list[dict[str, Any]] = []
        self.worst: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float | str] = {}

    def at_most(self, kind: str, name: str, value: float, bound: float) -> None:
        self.count += 1
        entry = {"name": name, "value": float(f"{value:.3e}"), "bound": bound}
        if kind not in self.worst or value > self.worst[kind]["value"]:
            self.worst[kind] = entry
        if not value <= bound:  # a value that is no number fails too
            self.failed.append({"kind": kind, **entry})
            say(f"  FAILED {kind}, {name}: {value:.3e}, wanted at most {bound:.0e}")

    def holds(self, kind: str, name: str, value: bool) -> None:
        self.at_most(kind, name, 0.0 if value else 1.0, 0.0)

    def group(self, name: str, work: Callable[[Options, Checks], None]) -> None:
        """Run a group of checks; an exception in it is a failed check."""
        if self.options.left < 5:
            self.seconds[name] = "skipped"
            self.failed.append({"kind": name, "error": "no time left"})
            return
        start = time.perf_counter()
        try:
            work(self.options, self)
        except Exception as error:
            self.count += 1
            self.failed.append({"kind": name, "error": message_of(error)})
            say(f"  FAILED {name}: {message_of(error)}")
        release()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        say(f"  {name}: {self.seconds[name]} s")
        self.options.note(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.failed and self.count > 0,
            "num_checks": self.count,
            "failed": self.failed,
            "worst": self.worst,
            "groups": self.seconds,
        }


def message_of(error: BaseException) -> str:
    """What went wrong and where, in short."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:600]} ({where})"


FAMILIES = ("llama", "gemma", "phi", "opt", "granite")
_POOLING = {"gemma": "mean", "phi": "weighted-mean"}
_STEP, _PAD = 7, 3


def small_config(family: str, tiny: bool, *, layers: int = 3, smooth: bool = True) -> Any:
    """A small configuration; besides `tiny`, heads are as wide as those of the real models.

    `smooth`: no ReLU. Where a rounding turns a sign its gradient jumps: 1e-3 in float32.
    """
    import transformers as t

    heads = 2
    width = 16 if tiny else {"llama": 128, "gemma": 256, "phi": 80}.get(family, 64)
    hidden = 128 if family == "gemma" else heads * width
    values: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": _PAD,
    }
    gated = {**values, "intermediate_size": 2 * hidden, "num_key_value_heads": 1}
    makers = {
        "llama": lambda: t.LlamaConfig(**gated),
        "gemma": lambda: t.GemmaConfig(**gated, head_dim=width),
        "phi": lambda: t.PhiConfig(**values, intermediate_size=256, partial_rotary_factor=0.4),
        "opt": lambda: t.OPTConfig(
            **values,
            ffn_dim=2 * hidden,
            word_embed_proj_dim=hidden,
            activation_function="gelu" if smooth else "relu",
        ),
        "granite": lambda: t.GraniteConfig(
            **gated,
            embedding_multiplier=12.0,
            residual_multiplier=1.4 / layers**0.5,
            attention_multiplier=width**-0.5,
        ),
    }
    config = makers[family]()
    disable_base_dropout(config)
    return config


def compute_norms_in_float64(model: nn.Module) -> None:
    """RMS norms of transformers compute in float32 whatever comes in: 1e-8 of noise in float64."""
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
        epsilon = getattr(module, "variance_epsilon", None) or module.eps

        def norm(x: Tensor, m: Any = module, o: float = offset, e: Any = epsilon) -> Tensor:
            out: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) * (m.weight + o)
            return out

        module.forward = norm


def make_encoder(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropout: float = 0.2,
    round_to: torch.dtype | None = None,
    pooling: Any = "eos",
) -> Encoder:
    """A random encoder, the same in every dtype and on every device; nothing of it is zero.

    `round_to`: a dtype that all weights are rounded to first.
    """
    from transformers import AutoModel

    draw = torch.Generator().manual_seed(0)

    def random_like(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=draw, dtype=torch.float32).mul_(std)

    torch.manual_seed(1)
    base = AutoModel.from_config(config)
    for parameter in base.parameters():
        parameter.data += random_like(parameter, 0.05)
        parameter.data = parameter.data.to(round_to or dtype).to(device, dtype)
    for module in base.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    base.requires_grad_(False)
    if dtype == torch.float64:
        compute_norms_in_float64(base)
    clock = DropoutClock(seed=5)
    model = attach_adapter(base, LoraSection(rank=4, dropout=dropout), clock, seed=2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B is zero at the start, which would hide errors in A's gradient
            values = random_like(parameter, 0.05).to(round_to or torch.float32)
            parameter.data = values.to(device, parameter.dtype)
    return Encoder(model, pooling=pooling, normalize=True, clock=clock)


@dataclass(frozen=True)
class Batch:
    """Texts and the rows that point into them."""

    store: TokenStore
    texts: StepTexts

    @property
    def tokens(self) -> int:
        return int(self.store.lengths[self.texts.text_P].sum())


def make_batch(rows: int, num_texts: int, longest: int) -> Batch:
    """Random triplets over few texts, so that some occur several times."""
    draw = np.random.default_rng(3)
    lengths = draw.integers(2, longest + 1, size=num_texts)
    store = TokenStore.from_lists([draw.integers(4, 60, size=n).tolist() for n in lengths])
    anchor_N, positive_N, negative_N = draw.integers(0, num_texts, size=(3, rows))
    table = RowTable(anchor_N, positive_N, negative_N[:, None])
    texts = step_texts(
        table,
        np.arange(rows),
        hard_negatives="batch",
        mask_duplicates=True,
        encode_twins_once=True,
    )
    return Batch(store, texts)


def batch_for(options: Options) -> Batch:
    return make_batch(6, 14, 12) if options.tiny else make_batch(16, 40, 40)


Gradients = dict[str, Tensor]


def taken_gradients(model: nn.Module) -> Gradients:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found, "no gradients at all"
    model.zero_grad(set_to_none=True)
    return found


def planned_gradients(
    encoder: Encoder,
    batch: Batch,
    plan: StepPlan,
    during: AbstractContextManager[Any] | None = None,
) -> tuple[Gradients, StepReport]:
    """Of one step by the plan; `during` is entered for the step and nothing else."""
    step = ContrastiveStep(
        encoder,
        batch.store,
        _PAD,
        LossSection(temperature=0.1),
        trainable_parameters(encoder.model),
        chunk_cost=2,
    )
    encoder.model.zero_grad(set_to_none=True)
    set_checkpointing(encoder.model, plan.checkpoint_every)
    with encoder.training_mode(_STEP), during or nullcontext():
        report = step(batch.texts, plan)
    return taken_gradients(encoder.model), report


def plain_gradients(
    encoder: Encoder, batch: Batch, during: AbstractContextManager[Any] | None = None
) -> Gradients:
    """Of one forward over all texts and one backward by the libraries' own layers.

    The encoder has no layers of ours any more after it.
    """
    taken = 0
    for module in encoder.model.modules():
        ours = module.__dict__.get("forward")
        if isinstance(ours, partial) and ours.func.__module__.startswith("lowmem_cft."):
            del module.__dict__["forward"]
            taken += "lora_A" in module._modules
    assert taken, "LoRA layers had no forward of ours"
    set_checkpointing(encoder.model, 0)
    texts = batch.texts
    with encoder.training_mode(_STEP), during or nullcontext():
        padded = pad(batch.store, texts.text_P, _PAD, "left")
        emb_SD = encoder(padded)[texts.place_S.to(encoder.device)]
        query_MD, doc_ND = emb_SD.tensor_split([texts.num_queries])
        candidates = texts.candidates.to(encoder.device)
        torch.autograd.backward(reference_loss(query_MD, doc_ND, candidates, temperature=0.1)[0])
    return taken_gradients(encoder.model)


def greatest_error(got: Gradients, wanted: Gradients) -> float:
    """Over the tensors, the greatest difference by the greatest magnitude.

    A tensor below a thousandth of the largest one is measured by that.
    """
    assert got.keys() == wanted.keys()
    sizes = {name: float(tensor.abs().max()) for name, tensor in wanted.items()}
    floor = max(sizes.values()) / 1000
    assert floor > 0, "all gradients are zero"
    return max(
        float((got[name].double() - tensor.double()).abs().max()) / max(sizes[name], floor)
        for name, tensor in wanted.items()
    )


def summed_error(got: Gradients, wanted: Gradients) -> float:
    """Of relative errors in the 2-norm: single elements differ by luck."""
    pairs = [(got[name].double(), tensor.double()) for name, tensor in wanted.items()]
    return sum(float((g - w).norm() / w.norm()) for g, w in pairs)


def plans_for(batch: Batch) -> dict[str, StepPlan]:
    """Every dial at its ends and between."""
    tokens = batch.tokens
    few, many = max(1, tokens // 8), max(1, tokens // 3)
    base = StepPlan(backward_tokens=few, forward_tokens=many)
    return {
        "none kept": base,
        "some kept": replace(base, kept_tokens=tokens // 2),
        "all kept": replace(base, kept_tokens=None),
        "checkpointed": replace(base, kept_tokens=tokens // 2, checkpoint_every=1),
        "every second, all kept": replace(base, kept_tokens=None, checkpoint_every=2),
        "offloaded": replace(base, offload_embeddings=True, kept_tokens=tokens // 2),
        "single texts": StepPlan(
            backward_tokens=1,
            forward_tokens=9,
            checkpoint_every=2,
            offload_embeddings=True,
            workspace_bytes=1,
        ),
    }


class FailAt(TorchDispatchMode):
    """Runs out of memory at the k-th operation that makes floating-point numbers, once."""

    def __init__(self, k: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = k

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        in_place = str(func).split(".")[1].endswith("_")  # allocates nothing
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not in_place and any(tensor.is_floating_point() for tensor in made):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory: injected")
        return result


# -- correctness: groups ----------------------------------------------------------------------


def check_plans(options: Options, checks: Checks, dtype: torch.dtype, bound: float) -> None:
    """Every plan's gradient, dropout on, is the plain one."""
    batch, kind = batch_for(options), f"plans in {str(dtype)[6:]}"
    for place, family in enumerate(FAMILIES):
        config = small_config(family, options.tiny, smooth=dtype != torch.float64)
        pooling = _POOLING.get(family, "eos")
        encoder = make_encoder(config, dtype, options.device, pooling=pooling)
        plans, found = list(plans_for(batch).items()), {}
        for name, plan in plans[place % 3 :: 3] if options.tiny else plans:
            found[name], report = planned_gradients(encoder, batch, plan)
            checks.holds("plan left as it was", f"{family}, {name}", report.plan == plan)
        wanted = plain_gradients(encoder, batch)
        for name, got in found.items():
            checks.at_most(kind, f"{family}, {name}", greatest_error(got, wanted), bound)


def check_bfloat16(options: Options, checks: Checks) -> None:
    """By the error that plain PyTorch makes in it; the bound is on the ratio of both."""
    batch, half = batch_for(options), torch.bfloat16
    plans = plans_for(batch)
    for family in FAMILIES:
        config = small_config(family, options.tiny)
        make = partial(make_encoder, config, device=options.device, round_to=half, dropout=0.1)
        wanted = plain_gradients(make(dtype=torch.float64), batch)
        autocast = torch.autocast(options.device.type, half)
        error = summed_error(plain_gradients(make(dtype=half), batch, autocast), wanted)
        encoder = make(dtype=half)
        for name in ("checkpointed",) if options.tiny else ("some kept", "checkpointed"):
            got, _ = planned_gradients(encoder, batch, plans[name])
            ratio = summed_error(got, wanted) / error
            checks.at_most("bf16 error by plain's", f"{family}, {name}", ratio, 1.5)


def check_padding(options: Options, checks: Checks) -> None:
    """Padded left, right or not at all: the same embeddings, with dropout and without."""
    batch = batch_for(options)
    text_P = batch.texts.text_P
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for family in FAMILIES:
            encoder = make_encoder(small_config(family, options.tiny), dtype, options.device)
            left, right = (pad(batch.store, text_P, _PAD, side) for side in ("left", "right"))
            alone = [pad(batch.store, text_P[i : i + 1], _PAD) for i in range(len(text_P))]
            for mode in (nullcontext(), encoder.training_mode(_STEP)):
                with torch.no_grad(), mode:
                    right_BD, left_BD = encoder(right), encoder(left)
                    each = [encoder(one, torch.tensor([i])) for i, one in enumerate(alone)]
                kind = f"padding in {str(dtype)[6:]}"
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
                wanted = reference_dropout(x_LF, *host, rate)
                got = identity_dropout(x_LF.to(options.device), *there, rate)
                name = f"{shape}, {str(dtype)[6:]}, rate {rate}"
                checks.holds("dropout on the device", name, same_bits(got, wanted))


def check_injected(options: Options, checks: Checks) -> None:
    """Memory that runs out at any operation changes the plan and not the gradient."""
    batch = batch_for(options)
    encoder = make_encoder(small_config("llama", True), torch.float64, options.device)
    plan = StepPlan(backward_tokens=batch.tokens // 3, forward_tokens=batch.tokens // 2)
    kept = replace(plan, kept_tokens=batch.tokens // 2, checkpoint_every=1)
    found: list[tuple[str, Gradients]] = []
    changed: set[str] = set()
    for plan_name, before in {"none kept": plan, "some kept": kept}.items():
        count = FailAt(0)
        planned_gradients(encoder, batch, before, count)
        for k in np.linspace(1, -count.left, 5 if options.tiny else 16).astype(int).tolist():
            name = f"{plan_name}, operation {k} of {-count.left}"
            try:
                got, report = planned_gradients(encoder, batch, before, FailAt(k))
            except DoesNotFit:  # right where a single text was in work
                continue
            found.append((name, got))
            checks.holds("plan took notice", name, report.plan != before)
            now = report.plan.to_json()
            changed |= {key for key, value in before.to_json().items() if value != now[key]}
    found.append(("loss", _failing_loss(encoder, batch, plan, changed)))
    wanted = plain_gradients(encoder, batch)
    for name, got in found:
        checks.at_most("out of memory", name, greatest_error(got, wanted), 1e-10)
    for key in ("forward_tokens", "backward_tokens", "kept_tokens", "workspace_bytes"):
        checks.holds("phases that ran out", key, key in changed)


def _failing_loss(encoder: Encoder, batch: Batch, plan: StepPlan, changed: set[str]) -> Gradients:
    from lowmem_cft import step

    real, fails = info_nce, [torch.OutOfMemoryError("CUDA out of memory: injected")]

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if fails:
            raise fails.pop()
        return result

    with mock.patch.object(step, "info_nce", failing):
        got, report = planned_gradients(encoder, batch, plan)
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
    planned_gradients(encoder, batch, plan)  # cuBLAS takes its workspace
    release()
    before = torch.cuda.memory_reserved(options.device)
    torch.cuda.reset_peak_memory_stats(options.device)
    wanted, _ = planned_gradients(encoder, batch, plan)
    rise = torch.cuda.max_memory_reserved(options.device) - before
    release()
    room = before + int(0.4 * rise)
    with capped(options, room + MARGINS["cuda"]):
        got, report = planned_gradients(encoder, batch, plan)
    say(f"  {rise / GIB:.2f} GiB wanted, 40 % given: {report.plan.describe()}")
    checks.holds("plan took notice", "of the allocator", report.plan != plan)
    checks.at_most("out of memory, real", "float32", greatest_error(got, wanted), 1e-5)


def check_repeatable(options: Options, checks: Checks) -> None:
    """The same step twice: the same bits."""
    batch = batch_for(options)
    for dtype in (torch.float32, torch.bfloat16):
        for family in FAMILIES[:1] if options.tiny else FAMILIES:
            encoder = make_encoder(small_config(family, options.tiny), dtype, options.device)
            plan = plans_for(batch)["checkpointed"]
            first, one = planned_gradients(encoder, batch, plan)
            second, two = planned_gradients(encoder, batch, plan)
            same = all(torch.equal(first[name], second[name]) for name in first)
            name = f"{family}, {str(dtype)[6:]}"
            checks.holds("second run", name, same and torch.equal(one.loss, two.loss))


def check_nf4(options: Options, checks: Checks) -> None:
    """Plans on 4-bit weights equal the plain step on the same ones."""
    reason = no_nf4(options)
    if reason is not None:
        say(f"  4-bit weights are not checked: {reason}")
        return
    batch = batch_for(options)
    for family in FAMILIES:
        recipe = make_recipe("demo", ["lora.dropout=0.1", "embedding.pooling=last"])
        config = small_config(family, options.tiny)
        torch.manual_seed(0)
        base = build_base(config, recipe, torch.float32, options.device)
        encoder = attach(base, recipe)
        nudge_adapter(encoder)
        names = ("checkpointed",) if options.tiny else ("some kept", "checkpointed")
        plans = [plans_for(batch)[name] for name in names]
        found = [planned_gradients(encoder, batch, plan)[0] for plan in plans]
        wanted = plain_gradients(encoder, batch)
        for got in found:
            checks.at_most("plans on nf4", family, greatest_error(got, wanted), 1e-5)


def check_correctness(options: Options) -> dict[str, Any]:
    """All groups; see the module."""
    checks = Checks(options)
    checks.group("dropout", check_dropout)
    plans = check_plans
    checks.group("float64", lambda o, c: plans(o, c, torch.float64, 1e-10))
    checks.group("float32", lambda o, c: plans(o, c, torch.float32, 1e-5))
    checks.group("bf16", check_bfloat16)
    checks.group("nf4", check_nf4)
    checks.group("padding", check_padding)
    checks.group("injected out of memory", check_injected)
    checks.group("real out of memory", check_real_out_of_memory)
    checks.group("repeatable", check_repeatable)
    return checks.to_json()


# -- memory: models ---------------------------------------------------------------------------


LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}

MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "MiniCPM-2B": ("cft-minicpm-2b", ()),
    "Gemma-2B": ("cft-gemma-2b", ()),
    "Phi-2": ("cft-phi-2", ()),
    "LLaMA-8B": ("prompteol-llama-7b", ("lora.rank=16",)),
}
"""Name -> recipe whose adapter and loss are used, and what is changed of it."""

_LOSS_SECONDS = 30.0
"""Kept of the part's time for the loss phase."""


def make_recipe(preset: str, overrides: Sequence[str] = ()) -> Recipe:
    return recipes.load(preset, overrides)


def config_for(name: str, recipe: Recipe, tiny: bool) -> Any:
    """The model's shapes, or a small model of the same architecture."""
    if name == "LLaMA-8B":
        from transformers import LlamaConfig

        config: Any = LlamaConfig(**LLAMA_8B)
    else:
        config = config_without_weights(recipe.model)
    if not tiny:
        return config
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    config.hidden_size, config.intermediate_size, config.vocab_size = 128, 320, 128
    config.num_hidden_layers, config.num_attention_heads = 8, 4
    if groups is not None:
        config.num_key_value_heads = 4 if groups == heads else 1
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = 32
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, 1)
    return config


def no_nf4(options: Options) -> str | None:
    """Why there are no 4-bit weights here; None if there are."""
    try:
        import bitsandbytes as bnb

        bare = nn.Linear(64, 64, bias=False, device="meta")
        layer = four_bit(bare, torch.float32, True, options.device)
        x = torch.ones(2, 64, device=options.device, requires_grad=True)
        out = layer(x)
        torch.autograd.backward(out.sum())
        assert bool(out.isfinite().all()), "its result is no number"
        say(f"  bitsandbytes {bnb.__version__} computes on {options.device}")
    except Exception as error:
        return message_of(error)
    return None


def four_bit(linear: Any, dtype: torch.dtype, double: bool, device: torch.device) -> Any:
    """An NF4 layer of random weights in the place of a linear layer without any."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    size = (linear.out_features, linear.in_features)
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=double,
        quant_type="nf4",
        device="meta",
    )
    weight = torch.empty(size, dtype=dtype, device=device).normal_(std=0.02)
    layer.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=layer
    ).to(device)
    if linear.bias is not None:  # else it would have torch's default dtype
        layer.bias = nn.Parameter(torch.empty_like(linear.bias), requires_grad=False)
    return layer


def build_base(config: Any, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> Any:
    """The recipe's base of random weights, made on the device one matrix at a time."""
    base = skeleton(config, dtype)
    if recipe.model.quantization == "nf4":
        for name in linear_names(base):
            parent, _, child = name.rpartition(".")
            linear = base.get_submodule(name)
            layer = four_bit(linear, dtype, recipe.model.double_quantization, device)
            setattr(base.get_submodule(parent), child, layer)
        base.is_loaded_in_4bit = True  # which peft asks
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(_filled(module, name, values), False)
    _fill_buffers(base, config, dtype, device)
    keep_weight_layout(base)
    base.requires_grad_(False)
    base.eval()
    return base


def _filled(module: nn.Module, name: str, values: Tensor) -> Tensor:
    """As a new model has it: norms pass on what comes in, biases are 0, the rest is random."""
    if values.ndim == 1:
        one = name == "weight" and "Gemma" not in type(module).__name__  # Gemma's count from 1
        return values.fill_(float(one))
    return values.normal_(std=0.02)


def _fill_buffers(base: Any, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Rotary frequencies and the like, which no checkpoint has: those of a model of one layer."""
    from transformers import AutoModel

    small = with_layers(config, 1)
    small.vocab_size = 8
    for key in ("intermediate_size", "ffn_dim"):
        if hasattr(small, key):
            setattr(small, key, 8)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, key, 1)
    real = dict(AutoModel.from_config(small, dtype=dtype).named_buffers())
    for name, _ in list(base.named_buffers()):
        owner, _, last = name.rpartition(".")
        base.get_submodule(owner)._buffers[last] = real[name].to(device)


def attach(base: Any, recipe: Recipe) -> Encoder:
    clock = DropoutClock(seed=recipe.train.seed)
    model = attach_adapter(base, recipe.lora, clock, seed=recipe.train.seed)
    section = recipe.embedding
    return Encoder(model, pooling=section.pooling, normalize=section.normalize, clock=clock)


def nudge_adapter(encoder: Encoder) -> None:
    """Make B something else than 0, so that no gradient is 0."""
    for name, parameter in encoder.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)


def weight_bytes(base: nn.Module) -> tuple[int, int]:
    """4-bit matrices with their scales, and everything else that is frozen."""
    quantized = plain = 0
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors = [parameter, state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
            quantized += sum(tensor.nbytes for tensor in tensors)
        elif "lora_" not in name:
            plain += parameter.nbytes
    return quantized, plain + sum(buffer.nbytes for buffer in base.buffers())


# -- memory: steps ----------------------------------------------------------------------------


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


@dataclass
class Peak:
    """Bytes: `before` and at most `allocated` while entered; `reserved` by the allocator."""

    rig: Rig
    before: int = 0
    allocated: int = 0
    reserved: int = 0

    def __enter__(self) -> Peak:
        device = self.rig.options.device
        release()
        if self.rig.options.cuda:
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return self
        self.before = self.rig.held_bytes()
        model = self.rig.encoder.model
        self._live = LiveBytes([*model.parameters(), *model.buffers()])
        self._live.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        device = self.rig.options.device
        if self.rig.options.cuda:
            synchronize(device)
            self.allocated = torch.cuda.max_memory_allocated(device)
            self.reserved = torch.cuda.max_memory_reserved(device)
            return
        self._live.__exit__(*error)  # type: ignore[no-untyped-call]
        self.allocated = self.reserved = self.before + self._live.peak


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
    with Peak(rig) as peak, rig.encoder.training_mode(_STEP):
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
    context = context_bytes(rig.options)
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
        "context_bytes": context,
        "within_cap": not rig.options.cuda or peak.reserved + context <= rig.options.cap_bytes,
    }


def context_bytes(options: Options) -> int:
    """Of the GPU's memory what is used beside this process's allocator; 0 on a CPU."""
    if not options.cuda:
        return 0
    free, total = torch.cuda.mem_get_info(options.device)
    return int(total - free - torch.cuda.memory_reserved(options.device))


def make_rig(name: str, options: Options, quantization: str, peak_flops: float) -> Rig:
    """Build the model and its planner."""
    preset, overrides = MODELS[name]
    recipe = make_recipe(preset, [*overrides, f"model.quantization={quantization}"])
    on_cpu = not options.cuda
    dtype = torch.float32 if on_cpu else choose_dtype("auto", options.device)
    config = config_for(name, recipe, options.tiny)
    longest = int(nli_lengths(10).max())
    planner = Planner(Footprint(recipe, config, dtype, longest), options.device.type)
    fixed = sum(planner.fixed_parts().values())
    if fixed > options.cap_bytes:
        raise ValueError(f"does not fit: {fixed / GIB:.2f} GiB before any text")
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
    rig = make_rig(name, options, quantization, peak_flops)
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


def measure_loss(options: Options, rows: int, dim: int, workspace_bytes: int) -> dict[str, Any]:
    """The loss phase alone: so many triplets' random embeddings, and the gradient of all of them."""
    slots, device = 3 * rows, options.device
    release()
    live = LiveBytes()
    with nullcontext() if options.cuda else live:
        if options.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if options.cuda else 0
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
    peak = torch.cuda.max_memory_allocated(device) if options.cuda else live.peak
    flops = 6.0 * rows * 2 * rows * dim
    return {
        "rows": rows,
        "dim": dim,
        "workspace_bytes": workspace_bytes,
        "seconds": round(seconds, 3),
        "tflops": round(flops / seconds / 1e12, 3),
        "loss": float(result.loss),
        "embedding_bytes": emb_SD.nbytes,
        "gradient_bytes": d_emb_SD.nbytes,
        "allocated_bytes": peak - before,
        "beside_them_bytes": peak - before - emb_SD.nbytes - d_emb_SD.nbytes,
        "matrix_bytes": 4 * rows * 2 * rows,
        "ok": bool(result.loss.isfinite()) and bool(d_emb_SD.isfinite().all()),
    }


def check_memory(options: Options) -> dict[str, Any]:
    """Real models under the cap, and the loss on a batch larger than there is time to encode."""
    found: dict[str, Any] = {"ok": True, "cap_bytes": options.cap_bytes, "models": {}}
    reason = no_nf4(options)
    quantization = "nf4" if reason is None else "none"
    if reason is not None:
        say(f"  16-bit weights in the place of 4-bit ones: {reason}")
        found["no_nf4"] = reason
    peak_flops = matrix_peak(options)
    found["matrix_tflops"] = round(peak_flops / 1e12, 3)
    release()
    with capped(options, options.cap_bytes):
        for place, name in enumerate(options.models):
            left = options.left - (0 if options.tiny else _LOSS_SECONDS)
            seconds = left / (len(options.models) - place)
            if left < (1 if options.tiny else 30):
                found["models"][name] = {"ok": True, "skipped": "no time left"}
                continue
            found["models"][name] = _guarded(
                name, partial(try_model, name, options, quantization, peak_flops, seconds)
            )
            release()
            options.note(found)
        found["loss_phase"] = _loss_phases(options)
    entries = [*found["loss_phase"], *found["models"].values()]
    found["ok"] = all(entry["ok"] for entry in entries)
    return found


def _loss_phases(options: Options) -> list[dict[str, Any]]:
    """65,536 triplets of MiniCPM-2B's embeddings and of LLaMA-8B's, in two workspaces."""
    rows = 512 if options.tiny else 65536
    found = []
    for dim, workspace_bytes in ((2304, 2**25), (4096, 2**25), (4096, 2**29)):
        if options.left < 3:
            found.append({"ok": False, "error": "no time left"})
            break
        work = partial(measure_loss, options, rows, 64 if options.tiny else dim, workspace_bytes)
        found.append(_guarded(f"loss, {dim}", work))
    return found


def _guarded(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or that it failed."""
    try:
        result = work()
    except Exception as error:
        result = {"ok": False, "error": message_of(error)}
    brief = {key: value for key, value in result.items() if key not in ("steps", "lora")}
    say(f"  {name}: {brief}")
    for step in result.get("steps", ()):
        keys = ("rows", "seconds", "tokens_per_s", "tflops", "ratio", "ratio_step", "moment")
        say(f"    { ({key: step[key] for key in keys}) }")
    return result


# -- dropout's speed --------------------------------------------------------------------------


def check_dropout_speed(options: Options) -> dict[str, Any]:
    """bench/dropout.py's comparison, in short rounds."""
    import dropout

    rows: list[dict[str, Any]] = []
    for dtype in dropout.DTYPES:
        for shape in dropout.SHAPES[:1] if options.tiny else dropout.SHAPES:
            sides = dropout.make_sides(shape, dtype, 0.1, options.device)
            rounds, budget = (3, 0.01) if options.tiny else (5, 0.05)
            row = dropout.compare(sides, rounds, budget, options.device)
            rows.append({"shape": list(shape), "dtype": str(dtype)[6:]} | row)
            say(f"  {rows[-1]}")
    return {
        "ok": True,
        "rows": rows,
        "ratio_median": round(median([row["ratio"] for row in rows]), 3),
        "ratio_worst": max(row["ratio"] for row in rows),
        "module_ratio_median": round(median([row["module_ratio"] for row in rows]), 3),
    }


# -- the whole --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part: gives what it found, with `ok`. `seconds`: its budget at most."""

    run: Callable[[Options], dict[str, Any]]
    seconds: float


PARTS: dict[str, Part] = {
    "device": Part(check_device, 40),
    "correctness": Part(check_correctness, 120),
    "memory": Part(check_memory, 290),
    "dropout_speed": Part(check_dropout_speed, 35),
}
"""In the order they run."""


def choose_options(values: argparse.Namespace, seconds: float) -> Options:
    cuda = values.device == "cuda" or (values.device is None and torch.cuda.is_available())
    return Options(
        # by its number: some of torch.cuda's functions take no device without one
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        tiny=values.tiny,
        cap_bytes=parse_bytes(values.cap),
        seconds=seconds,
        step_seconds=2.0 if values.tiny else 25.0,
        models=tuple(values.models or MODELS),
        result=values.result,
    )


def run_here(name: str, values: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A part in this process; an exception is its result."""
    start = time.perf_counter()
    found: dict[str, Any] = {}
    try:
        quiet_libraries()
        options = choose_options(values, seconds)
        found = {"ok": True, **PARTS[name].run(options)}
        found["machine"] = machine(options.device)
    except Exception as error:
        traceback.print_exc()
        found = {"ok": False, "error": message_of(error)}
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def run_apart(name: str, values: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A part in a process of its own, ended somewhat after its time is over."""
    arguments = ["--here", "--only", name, "--cap", values.cap, "--seconds", f"{seconds:.0f}"]
    arguments += ["--tiny"] if values.tiny else []
    arguments += ["--device", values.device] if values.device else []
    arguments += ["--models", *values.models] if values.models else []
    start = time.perf_counter()
    limit = min(seconds + 45, _HARD_END - (start - _STARTED)) if not values.tiny else seconds + 45
    found = run_limited(Path(__file__), arguments, max(5.0, limit))
    taken = round(time.perf_counter() - start, 1)
    found = {"ok": False, **found, "seconds": taken}
    if found.pop("unfinished", False):
        found["ok"] = False
    if "error" in found:
        found["ok"] = False
    return found


def run_parts(values: argparse.Namespace) -> dict[str, Any]:
    """Every chosen part in turn; what there is so far is written after each."""
    names = [name for name in PARTS if not values.only or name in values.only]
    shown = ("tiny", "cap", "device", "only", "models", "seconds")
    found: dict[str, Any] = {
        "ok": False,
        "seconds": 0.0,
        "parts": {},
        "machine": {},
        "versions": versions(LIBRARIES),
        "options": {key: getattr(values, key) for key in shown},
    }
    for place, name in enumerate(names):
        later = sum(PARTS[other].seconds for other in names[place + 1 :])
        left = values.seconds - (time.perf_counter() - _STARTED)
        seconds = min(PARTS[name].seconds, max(left - later, left / 2))
        if seconds < 5:
            found["parts"][name] = {"ok": False, "error": "not begun: no time left"}
            continue
        say(f"{name}: up to {seconds:.0f} s")
        part = (run_here if values.here else run_apart)(name, values, seconds)
        found["machine"] = part.pop("machine", found["machine"])
        found["parts"][name] = part
        say(
            f"{name}: {'ok' if part['ok'] else 'FAILED'}, {part['seconds']} s {part.get('error', '')}"
        )
        found["seconds"] = round(time.perf_counter() - _STARTED, 1)
        found["ok"] = all(part["ok"] for part in found["parts"].values()) and len(
            found["parts"]
        ) == len(names)
        if values.out:
            write_whole(out_path(values.out, found), found)
    return found


def out_path(given: str, found: Mapping[str, Any]) -> Path:
    """`--out`'s file; auto: named after the device and the day."""
    if given != "auto":
        return Path(given)
    device = re.sub(r"[^a-z0-9]+", "-", str(found["machine"].get("device", "unknown")).lower())
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"gpu_check_{device.strip('-')}_{date.today().isoformat()}.json"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument("--only", action="append", choices=tuple(PARTS), help="may be repeated")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="for memory; all")
    parser.add_argument("--cap", default="12GiB", help="memory that the process may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="CUDA where there is one")
    parser.add_argument("--seconds", type=float, default=420.0, help="after it nothing new begins")
    parser.add_argument("--out", help="file for the results, or auto")
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    values = parse_arguments(argv)
    if values.result is not None:  # one part, for `run_apart`
        (name,) = values.only
        part = run_here(name, values, values.seconds)
        write_whole(values.result, part)
        return 0
    found = run_parts(values)
    print_line(found)
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
