"""The planner's predictions against what real steps hold, and its choices against the limit."""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lowmem_cft.cli import app as cli
from lowmem_cft.data.batches import RowTable, step_texts
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient.plan import WORKSPACE_BYTES, StepPlan
from lowmem_cft.gradient.step import candidates_of, loss_options
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.limits import MARGINS
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft.planning.planner import (
    INDEX_BYTES,
    LOSS_WORKSPACES,
    BatchShape,
    Planner,
    _loss_bytes,
)
from lowmem_cft.recipe.load import parse_recipe
from lowmem_cft.recipe.schema import LossSection, MemorySection, ModelSection, Recipe
from lowmem_cft.units import GIB
from lowmem_cft_kernels import info_nce
from plain import Batch, make_encoder, planned_gradients
from tiny import save_tiny, tiny_config

ROWS = 40


def wide_config(family: str) -> Any:
    """Large enough that no tensor of the step is negligible beside Python's own."""
    config = tiny_config(family)
    for key, value in {"hidden_size": 192, "intermediate_size": 512, "ffn_dim": 512}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if family == "opt":
        config.word_embed_proj_dim = 192
    config.num_hidden_layers = 6
    config.vocab_size = 64
    if getattr(config, "head_dim", None):
        config.head_dim = 48
    return config


def make_batch(rows: int = ROWS, seed: int = 0) -> Batch:
    """Triplets of texts with lengths as of short sentences, none twice."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.gamma(4.0, 4.0, size=3 * rows).astype(int), 3, 48)
    store = TokenStore.from_lists([draw.integers(4, 60, size=n).tolist() for n in lengths])
    places = np.arange(3 * rows)
    return Batch(store, RowTable(places[:rows], places[rows : 2 * rows], places[2 * rows :, None]))


def shape_of(batch: Batch) -> BatchShape:
    lengths = batch.store.lengths
    return BatchShape(len(batch.table), 3, int(lengths.max()), lengths)


def make_recipe(**sections: Any) -> Recipe:
    values = {"data": {"sources": [{"path": "demo"}]}, "lora": {"rank": 4}, **sections}
    return parse_recipe(values, "test")


def make_planner(config: Any, dtype: torch.dtype, longest: int, **sections: Any) -> Planner:
    planner = Planner(Footprint(make_recipe(**sections), config, dtype, longest, "cpu"))
    planner.chunk_cost = 2  # as `planned_gradients` cuts
    return planner


CONFIGURATIONS = [
    # family, dtype, dropout, quantization, plan
    ("llama", torch.float32, 0.0, "none", {"kept_tokens": 0}),
    ("llama", torch.float32, 0.0, "none", {"kept_tokens": None}),
    ("llama", torch.float32, 0.1, "none", {"kept_tokens": 600}),
    ("llama", torch.float32, 0.0, "none", {"checkpoint_every": 1}),
    ("llama", torch.float32, 0.0, "none", {"checkpoint_every": 2, "kept_tokens": None}),
    ("llama", torch.bfloat16, 0.1, "none", {"kept_tokens": 600}),
    ("llama", torch.float32, 0.0, "nf4", {"kept_tokens": 600}),
    ("llama", torch.bfloat16, 0.0, "nf4", {"checkpoint_every": 1, "kept_tokens": None}),
    ("opt", torch.float32, 0.0, "none", {"kept_tokens": 0}),
    ("opt", torch.float32, 0.1, "none", {"kept_tokens": None}),
    ("opt", torch.bfloat16, 0.0, "none", {"checkpoint_every": 1}),
    ("gemma", torch.float32, 0.0, "none", {"kept_tokens": 600}),
    ("gemma", torch.float32, 0.1, "none", {"checkpoint_every": 4}),
    ("phi-2", torch.float32, 0.0, "none", {"kept_tokens": 0}),
    ("phi-2", torch.bfloat16, 0.1, "none", {"kept_tokens": None}),
    ("phi-2", torch.float32, 0.0, "nf4", {"checkpoint_every": 1}),
    ("minicpm", torch.float32, 0.0, "none", {"checkpoint_every": 4, "targets": ["q_proj"]}),
    ("minicpm", torch.bfloat16, 0.1, "none", {"checkpoint_every": 4, "targets": ["q_proj"]}),
]


def make_base(config: Any, dtype: torch.dtype, quantization: str, folder: Path) -> Any:
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(config).to(dtype)
    if quantization == "none":
        return model
    from tiny import tiny_tokenizer

    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    section = ModelSection(id=str(folder), quantization="nf4", dtype=names[dtype])
    return load_backbone(section, torch.device("cpu")).model


def measured_bytes(
    batch: Batch, base: Any, dropout: float, plan: StepPlan, targets: Any = "all-linear"
) -> int:
    """Most bytes of live tensors that a real step makes, gradients included."""
    encoder = make_encoder(dropout=dropout, dtype=base.dtype, base=base, targets=targets)
    live = LiveBytes([*encoder.model.parameters(), *encoder.model.buffers()])
    planned_gradients(encoder, batch, batch.texts(twins_once=True), plan, during=live)
    return live.peak


STEP_PARTS = (
    "index",
    "embeddings",
    "embedding_gradient",
    "kept_graphs",
    "activations",
    "loss_workspace",
)


@pytest.mark.parametrize(
    ("family", "dtype", "dropout", "quantization", "dials"),
    CONFIGURATIONS,
    ids=[f"{c[0]}-{str(c[1])[6:]}-{c[3]}-{i}" for i, c in enumerate(CONFIGURATIONS)],
)
def test_predicted_is_measured(
    family: str,
    dtype: torch.dtype,
    dropout: float,
    quantization: str,
    dials: dict[str, Any],
    tmp_path: Path,
) -> None:
    """What a step makes besides what the model always holds, which would hide errors."""
    batch = make_batch()
    config = wide_config(family)
    dials = dict(dials)
    targets = dials.pop("targets", "all-linear")
    plan = StepPlan(**{"backward_tokens": 200, "forward_tokens": 400, **dials})
    sections = {
        "lora": {"rank": 4, "dropout": dropout, "targets": targets},
        "model": {"quantization": quantization},
    }
    shape = shape_of(batch)
    predicted = make_planner(config, dtype, shape.longest, **sections).predict(plan, shape)
    parts = predicted.parts
    total = sum(parts.get(name, 0) for name in STEP_PARTS)
    total += parts["gradients"] if "backward" in predicted.moment else 0
    base = make_base(config, dtype, quantization, tmp_path)
    measured = measured_bytes(batch, base, dropout, plan, targets)
    print(f"{predicted.moment}: {total / measured:.3f}")
    assert 0.95 <= total / measured <= 1.10, (predicted.moment, total / measured, parts)


@pytest.mark.parametrize("rows", [24, 400])
@pytest.mark.parametrize("softmaxes", ["one_way", "symmetric", "gte", "qwen3"])
@pytest.mark.parametrize("more", [{}, {"false_negative_margin": 0.1, "hardness": 1.0}])
def test_the_loss_takes_no_more_than_predicted(
    rows: int, softmaxes: Any, more: dict[str, Any]
) -> None:
    """With all queries at once, which the usual workspace has room for."""
    draw, dim = np.random.default_rng(0), 192
    table = RowTable(*draw.integers(0, 5 * rows, (2, rows)), draw.integers(0, 5 * rows, (rows, 1)))
    texts = step_texts(
        table,
        np.arange(rows),
        hard_negatives="batch",
        mask_duplicates=True,
        encode_twins_once=False,
    )
    section = LossSection(softmaxes=softmaxes, **more)
    emb_SD = torch.nn.functional.normalize(torch.randn(3 * rows, dim), dim=1)
    d_emb_SD = torch.empty_like(emb_SD)
    live = LiveBytes([emb_SD, d_emb_SD])
    with live:
        info_nce(
            emb_SD[:rows],
            emb_SD[rows:],
            candidates_of(texts),
            temperature=0.05,
            **loss_options(section),
            workspace_bytes=WORKSPACE_BYTES,
            out=(d_emb_SD[:rows], d_emb_SD[rows:]),
        )
    predicted = _loss_bytes(BatchShape(rows, 3, 8), dim, section)
    assert predicted < WORKSPACE_BYTES
    assert live.peak <= predicted + 3 * rows * INDEX_BYTES
    assert rows < 100 or live.peak > 0.15 * predicted, "a bound that says nothing"


@pytest.mark.parametrize("double", [True, False])
def test_weights_are_weighed_as_loaded(double: bool, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    folder = save_tiny(tmp_path / "opt", "opt")
    section = ModelSection(
        id=str(folder), quantization="nf4", double_quantization=double, dtype="fp32"
    )
    base = load_backbone(section, torch.device("cpu")).model
    encoder = make_encoder(dtype=torch.float32, base=base)
    quantized = 0
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors = [module.weight, state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code, state.offset]
            quantized += sum(tensor.nbytes for tensor in tensors)
    made = make_recipe(model={"quantization": "nf4", "double_quantization": double})
    weights = Footprint(made, tiny_config("opt"), torch.float32, 16, "cpu").weights
    assert quantized > 0
    assert weights.quantized_bytes == quantized
    plain = [p for n, p in base.named_parameters() if "lora" not in n and p.dtype.is_floating_point]
    assert weights.plain_bytes == sum(p.nbytes for p in [*plain, *base.buffers()])
    trained = [p for p in encoder.model.parameters() if p.requires_grad]
    assert weights.num_trained == sum(p.numel() for p in trained)


def counted_and_allocated() -> tuple[int, int]:
    """Peak bytes of one step as we count them, and as torch's allocator records them."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)  # a new process has as many as there are cores
    batch, config = make_batch(), wide_config("llama")
    plan = StepPlan(backward_tokens=200, forward_tokens=400, kept_tokens=600)
    counted = measured_bytes(batch, make_base(config, torch.float32, "none", Path()), 0.0, plan)
    base = make_base(config, torch.float32, "none", Path())
    encoder = make_encoder(dtype=torch.float32, base=base)
    texts = batch.texts(twins_once=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        planned_gradients(encoder, batch, texts, plan)
    results: Any = record.profiler
    # The allocator's own running totals: sums of sizes in the order of the events' clock would
    # rest on a clock that never steps back.
    totals, todo = [0], list(results.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == _EventType.Allocation:
            totals.append(event.extra_fields.total_allocated)
    assert len(totals) > 1000
    return counted, max(totals)


def test_live_bytes_are_what_the_allocator_sees() -> None:
    """The counter that predictions are held against, against torch's own record.

    In a process of its own: the allocator also records what a test before left to be freed.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        counted, allocated = pool.submit(counted_and_allocated).result()
    assert 0.97 <= counted / allocated <= 1.01  # operations hold a little inside themselves


def test_peak_grows_by_the_embeddings_and_their_gradient_alone() -> None:
    """From a batch of 256 triplets to one of 8192, at the same chunks."""
    config = wide_config("llama")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 512, 64
    config.head_dim = 128
    plan = StepPlan(backward_tokens=256, forward_tokens=256, workspace_bytes=2**20)
    draw = np.random.default_rng(0)
    peaks = {}
    for rows in (256, 8192):
        tokens = [draw.integers(4, 60, size=n).tolist() for n in draw.integers(1, 3, 3 * rows)]
        places = np.arange(3 * rows)
        table = RowTable(places[:rows], places[rows : 2 * rows], places[2 * rows :, None])
        base = make_base(config, torch.float32, "none", Path())
        peaks[rows] = measured_bytes(Batch(TokenStore.from_lists(tokens), table), base, 0.0, plan)
    slope = (peaks[8192] - peaks[256]) / (8192 - 256)
    assert 0.9 <= slope / (3 * 512 * (4 + 4)) <= 1.1


@pytest.fixture(scope="module")
def llama() -> Planner:
    return make_planner(wide_config("llama"), torch.float32, 48, model={"quantization": "none"})


SHAPE = BatchShape(1000, 3, 48, make_batch(1400).store.lengths)


def test_less_memory_costs_more_time_and_never_more_memory(llama: Planner) -> None:
    whole = llama.choose(MemorySection(), SHAPE, 100 * GIB)
    assert whole.plan.kept_tokens is None
    assert whole.plan.checkpoint_every == 0
    assert 1 <= whole.relative_cost < 1.1
    least = MARGINS["cpu"] + 40 * 2**20
    seen = []
    for limit in np.linspace(least, whole.peak_bytes, 12):
        found = llama.choose(MemorySection(), SHAPE, int(limit))
        assert found.peak_bytes <= limit
        seen.append(found.relative_cost)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 1.4  # something was encoded twice


def test_one_extra_forward_when_nothing_is_kept(llama: Planner) -> None:
    section = MemorySection(keep_graphs="off", checkpointing="off")
    none = llama.choose(section, SHAPE, 100 * GIB)
    whole = llama.choose(MemorySection(), SHAPE, 100 * GIB)
    plan = replace(none.plan, kept_tokens=none.padded_tokens // 2)
    half = llama.predict(plan, SHAPE)
    assert none.relative_cost - whole.relative_cost < 0.53  # a forward is nearly half a step
    assert half.relative_cost == pytest.approx(
        (none.relative_cost + whole.relative_cost) / 2, rel=0.01
    )


def test_fixed_dials_stay_fixed(llama: Planner) -> None:
    section = MemorySection(
        token_budget=300, keep_graphs="off", checkpointing=3, offload_embeddings="on"
    )
    plan = llama.choose(section, SHAPE, 100 * GIB).plan
    assert (plan.backward_tokens, plan.kept_tokens) == (300, 0)
    assert (plan.checkpoint_every, plan.offload_embeddings) == (3, True)


def test_what_does_not_fit_says_what_would_help(llama: Planner) -> None:
    with pytest.raises(ValueError, match=r"48 tokens.*at least .* GiB.*nf4.*max_tokens"):
        llama.choose(MemorySection(), SHAPE, MARGINS["cpu"] + 5 * 2**20)
    tight = MARGINS["cpu"] + 25 * 2**20
    with pytest.raises(ValueError, match=r"train\.logical_batch up to \d+") as caught:
        llama.choose(MemorySection(), replace(SHAPE, rows=100_000), tight)
    rows = int(re.findall(r"logical_batch up to (\d+)", str(caught.value))[0])
    shape = replace(SHAPE, rows=rows, lengths=None)
    assert llama.choose(MemorySection(), shape, tight).peak_bytes <= tight
    with pytest.raises(ValueError, match="limit"):
        llama.choose(MemorySection(), replace(shape, rows=2 * rows), tight)


def plan_json(*arguments: str) -> dict[str, Any]:
    outcome = CliRunner().invoke(cli.app, ["plan", *arguments, "--json"])
    assert outcome.exit_code == 0, outcome.output
    found: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return found


def test_a_huge_batch_fits_a_small_card() -> None:
    """65,536 triplets of 2304 dimensions in 12 GiB: from the configuration alone."""
    found = plan_json("cft-minicpm-2b", "--memory", "12GiB", "--set", "train.logical_batch=65536")
    parts = found["peak_bytes"]
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert parts["total"] <= 12 * GIB
    # 2.4 billion weights in the layers at half a byte and 1/127 of one for their scales
    assert parts["weights_4bit"] == pytest.approx(40 * 61.06e6 * (0.5 + 1 / 63.5), rel=0.01)
    assert found["max_logical_batch"][str(12 * GIB)] >= 65536
    sizes = [found["max_logical_batch"][str(gib * GIB)] for gib in (6, 8, 12, 16, 24)]
    assert sizes == sorted(sizes)
    assert found["plan"]["backward_tokens"] >= found["longest_text_tokens"]


def test_plan_reads_data_that_is_at_hand(tiny_folder: Path) -> None:
    found = plan_json(
        "demo",
        "--set",
        f"model.id={tiny_folder}",
        "--memory",
        "4GB",
        "--device",
        "cpu",
        "--set",
        "model.keep_layers=null",
    )
    assert found["notes"] == []
    assert found["limit_bytes"] == 4 * 10**9
    assert found["tokens_per_step"] < found["texts_per_step"] * found["longest_text_tokens"] / 2
    assert found["padded_tokens_per_step"] < 1.3 * found["tokens_per_step"]


def test_a_gpus_loss_takes_the_room_that_there_is() -> None:
    """The largest workspace that fits the limit, and the usual one where none does."""
    recipe = make_recipe(model={"quantization": "none"})
    section = MemorySection(token_budget=8, keep_graphs="off", offload_embeddings="off")
    shape = BatchShape(60000, 3, 8)

    def planner(device_type: str) -> Planner:
        return Planner(Footprint(recipe, tiny_config("llama"), torch.float32, 8, device_type))

    def workspace(limit_bytes: int) -> int:
        return planner("cuda").choose(section, shape, limit_bytes).plan.workspace_bytes

    assert planner("cpu").choose(section, shape, 2**40).plan.workspace_bytes == WORKSPACE_BYTES
    largest = planner("cuda").choose(section, shape, 2**40)
    assert largest.moment == "loss"
    assert largest.plan.workspace_bytes == max(LOSS_WORKSPACES["cuda"])
    sizes = [2**29, 2**28, 2**27, 2**26, WORKSPACE_BYTES]
    for size, smaller in pairwise(sizes):
        plan = replace(largest.plan, workspace_bytes=size)
        needed = planner("cuda").predict(plan, shape).peak_bytes
        assert workspace(needed) == size
        assert workspace(needed - 1) == smaller
