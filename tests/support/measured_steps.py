"""Models wide enough for real steps to be measured, and what such steps hold beside predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bidirectional import BIDIRECTIONAL
from lowmem_cft.data.batches import RowTable
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.configs import base_model_kwargs, disable_layer_dropout
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft.planning.prediction import BatchShape
from lowmem_cft.planning.tracing import with_layers
from lowmem_cft.recipe.load import parse_recipe
from lowmem_cft.recipe.schema import ModelSection, Recipe
from plain import Batch, make_encoder, planned_gradients
from tiny import FAMILIES, tiny_config, tiny_tokenizer

ROWS = 40


def wide_config(family: str) -> Any:
    """Large enough that no tensor of the step is negligible beside Python's own."""
    config = tiny_config(family) if family in FAMILIES else BIDIRECTIONAL[family]()
    for key, value in {"hidden_size": 192, "intermediate_size": 512, "ffn_dim": 512}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if family == "opt":
        config.word_embed_proj_dim = 192
    config = with_layers(config, 6)
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


def make_base(config: Any, dtype: torch.dtype, quantization: str, folder: Path) -> Any:
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(config, **base_model_kwargs(config)).to(dtype)
    disable_layer_dropout(model)  # as where it is loaded
    if quantization == "none":
        return model
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
