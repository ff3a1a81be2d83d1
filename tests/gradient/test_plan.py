"""How embeddings wait for the loss, and what the loss is told to do with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem_cft.gradient import step
from lowmem_cft.gradient.plan import StepPlan, auto_embedding_dtype
from lowmem_cft.planning.choice import Planner
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.prediction import BatchShape
from lowmem_cft.recipe.load import parse_recipe
from lowmem_cft.recipe.schema import LossSection, MemorySection
from lowmem_cft_kernels import Products, info_nce, split_bytes
from numerics import assert_same
from plain import make_batch, make_encoder, planned_gradients
from tiny import tiny_config


@pytest.mark.parametrize(
    ("capability", "normalized", "wanted"),
    [
        (None, True, "fp32"),
        ((8, 6), True, "fp16"),
        ((8, 6), False, "split-bf16"),
        ((7, 5), True, "fp16"),
        ((7, 5), False, "fp32"),
    ],
)
def test_auto_is_on_tensor_cores_and_rounds_little(
    capability: tuple[int, int] | None, normalized: bool, wanted: str
) -> None:
    assert auto_embedding_dtype(capability, normalized=normalized) == wanted


def planner(device_type: str, *, normalize: bool = True) -> Planner:
    values = {"data": {"sources": [{"path": "demo"}]}, "embedding": {"normalize": normalize}}
    recipe = parse_recipe(values, "test")
    return Planner(Footprint(recipe, tiny_config("llama"), torch.bfloat16, 20, device_type))


@pytest.mark.parametrize(
    ("device_type", "normalize", "wanted"),
    [("cpu", True, "fp32"), ("cuda", True, "fp16"), ("cuda", False, "split-bf16")],
)
def test_a_plan_chooses_by_device_and_range(device_type: str, normalize: bool, wanted: str) -> None:
    shape, card = BatchShape(100, 3, 20), planner(device_type, normalize=normalize)
    chosen = card.choose(MemorySection(), shape, 8 * 2**30).plan
    assert chosen.embedding_dtype == wanted
    fixed = card.choose(MemorySection(embedding_dtype="bf16"), shape, 8 * 2**30).plan
    assert fixed.embedding_dtype == "bf16"


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_float16_costs_less_than_bfloat16_in_a_step(temperature: float) -> None:
    """Gradients of a whole step from embeddings that wait in 16 bits, by float32's."""
    batch = make_batch(12, 2, texts=30)
    texts = batch.texts(twins_once=True)
    gradients = {}
    for embedding_dtype in ("fp32", "fp16", "bf16"):
        plan = StepPlan(backward_tokens=24, forward_tokens=60, embedding_dtype=embedding_dtype)
        encoder = make_encoder(dtype=torch.float32)
        gradients[embedding_dtype], _ = planned_gradients(
            encoder, batch, texts, plan, loss=LossSection(temperature=temperature)
        )
    errors = {
        name: sum(float((g - gradients["fp32"][key]).norm()) for key, g in values.items())
        for name, values in gradients.items()
    }
    assert 0 < errors["fp16"] < errors["bf16"] / 4


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


@pytest.mark.parametrize(
    ("dials", "wanted"),
    [
        ({"kept_tokens": None}, ["all graphs kept (what the backward pass needs)", "once"]),
        ({}, ["(64 where only vectors are wanted)", "no graph kept", "each text is encoded twice"]),
        ({"kept_tokens": 48}, ["graphs of 48 tokens kept", "other texts are encoded twice"]),
        ({"checkpoint_every": 2}, ["every 2nd layer checkpointed (computed again"]),
        ({"embedding_dtype": "fp16"}, ["embeddings in fp16"]),
    ],
)
def test_a_plan_is_told_in_words(dials: dict[str, Any], wanted: list[str]) -> None:
    told = StepPlan(backward_tokens=24, forward_tokens=64, **dials).describe()
    assert told.startswith("chunks of up to 24 tokens, padding counted")
    assert all(words in told for words in wanted), told
