"""How embeddings wait for the loss, and what the loss is told to do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import tiny_config
from lowmem_cft import recipe as recipes
from lowmem_cft import step
from lowmem_cft.footprint import Footprint
from lowmem_cft.plan import BF16_TEMPERATURE, StepPlan, auto_embedding_dtype
from lowmem_cft.planner import BatchShape, Planner
from lowmem_cft.recipe import MemorySection
from lowmem_cft_kernels import Products, info_nce, split_bytes
from numerics import assert_same
from plain import make_batch, make_encoder, planned_gradients


@pytest.mark.parametrize(
    ("capability", "temperature", "normalized", "wanted"),
    [
        (None, 0.05, True, "fp32"),
        ((8, 6), 0.05, True, "bf16"),
        ((8, 6), BF16_TEMPERATURE, True, "bf16"),
        ((9, 0), 0.9 * BF16_TEMPERATURE, True, "split-bf16"),
        ((8, 6), 0.05, False, "split-bf16"),
        ((7, 5), 0.05, True, "fp16"),
        ((7, 5), 0.05, False, "fp32"),
    ],
)
def test_auto_takes_16_bits_where_they_round_little(
    capability: tuple[int, int] | None, temperature: float, normalized: bool, wanted: str
) -> None:
    got = auto_embedding_dtype(capability, temperature=temperature, normalized=normalized)
    assert got == wanted


def planner(device_type: str, **loss: Any) -> Planner:
    values = {"data": {"sources": [{"path": "demo"}]}, "loss": loss}
    recipe = recipes.parse(values, "test")
    return Planner(Footprint(recipe, tiny_config("llama"), torch.bfloat16, 20, device_type))


@pytest.mark.parametrize(
    ("device_type", "loss", "wanted"),
    [
        ("cpu", {}, "fp32"),
        ("cuda", {"temperature": 0.05}, "bf16"),
        ("cuda", {"temperature": 0.01}, "split-bf16"),
        ("cuda", {"temperature": 0.05, "learn_temperature": True}, "split-bf16"),
    ],
)
def test_a_plan_chooses_by_device_and_lowest_temperature(
    device_type: str, loss: dict[str, Any], wanted: str
) -> None:
    shape = BatchShape(100, 3, 20)
    prediction = planner(device_type, **loss).choose(MemorySection(), shape, 8 * 2**30)
    assert prediction.plan.embedding_dtype == wanted
    fixed = MemorySection(embedding_dtype="fp16")
    assert (
        planner(device_type, **loss).choose(fixed, shape, 8 * 2**30).plan.embedding_dtype == "fp16"
    )


def test_halves_are_counted_on_a_card_alone() -> None:
    shape, size = BatchShape(4096, 3, 20), split_bytes(3 * 4096, 64)
    for device_type, more in {"cuda": size, "cpu": 0}.items():
        workspaces = [
            planner(device_type)._moments(
                StepPlan(backward_tokens=20, forward_tokens=20, embedding_dtype=dtype),
                shape,
                planner(device_type).chunk(20, 0),
                planner(device_type).chunk(20, 0),
                0.0,
                all_kept=False,
            )["loss"]["loss_workspace"]
            for dtype in ("fp32", "split-bf16")
        ]
        assert workspaces[1] - workspaces[0] == more


@pytest.mark.parametrize(
    ("embedding_dtype", "dtype", "wanted"),
    [
        ("split-bf16", torch.float32, Products.SPLIT_BF16),
        ("split-bf16", torch.float64, Products.EXACT),
        ("fp32", torch.float32, Products.EXACT),
    ],
)
def test_the_loss_is_told_how_to_multiply(
    embedding_dtype: str, dtype: torch.dtype, wanted: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Products] = []

    def noted(*args: Any, products: Products, **options: Any) -> Any:
        told.append(products)
        return info_nce(*args, products=products, **options)

    monkeypatch.setattr(step, "info_nce", noted)
    batch = make_batch(5, 1)
    texts = batch.texts(twins_once=True)
    plan = StepPlan(backward_tokens=24, forward_tokens=60)
    exact, _ = planned_gradients(make_encoder(dtype=dtype), batch, texts, plan)
    chosen = StepPlan(backward_tokens=24, forward_tokens=60, embedding_dtype=embedding_dtype)
    got, _ = planned_gradients(make_encoder(dtype=dtype), batch, texts, chosen)
    assert told == [Products.EXACT, wanted]
    assert_same(got, exact, 1e-12)  # a CPU multiplies exactly whatever it is told
