"""Predictions against what real steps hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.data.batches import RowTable, step_texts
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient.plan import WORKSPACE_BYTES, StepPlan
from lowmem_cft.gradient.step import candidates_of, loss_options
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft.planning.prediction import INDEX_BYTES, BatchShape
from lowmem_cft.recipe.schema import LossSection
from lowmem_cft_kernels import info_nce
from measured_steps import (
    make_base,
    make_batch,
    make_planner,
    measured_bytes,
    shape_of,
    wide_config,
)
from plain import Batch

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
    ("modernbert", torch.float32, 0.0, "none", {"kept_tokens": None}),
    ("bert", torch.bfloat16, 0.0, "none", {"checkpoint_every": 1}),
]


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
    config = wide_config("llama")
    planner = make_planner(config, torch.float32, 8, loss={"softmaxes": softmaxes, **more})
    assert planner.footprint.dim == dim
    plan = StepPlan(backward_tokens=8, forward_tokens=8)
    predicted = planner._loss_bytes(plan, BatchShape(rows, 3, 8))
    assert predicted < WORKSPACE_BYTES
    assert live.peak <= predicted + 3 * rows * INDEX_BYTES
    assert rows < 100 or live.peak > 0.15 * predicted, "a bound that says nothing"


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
