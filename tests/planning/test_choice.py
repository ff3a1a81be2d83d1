"""The planner's choices against the limit."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from bidirectional import BIDIRECTIONAL
from lowmem_cft.gradient.plan import WORKSPACE_BYTES
from lowmem_cft.planning.choice import LOSS_WORKSPACES, Planner
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.limits import MARGINS
from lowmem_cft.planning.prediction import BatchShape
from lowmem_cft.recipe.schema import MemorySection
from lowmem_cft.units import GIB
from measured_steps import make_batch, make_planner, make_recipe, wide_config
from tiny import tiny_config


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
    costs = []
    for limit in np.linspace(least, whole.peak_bytes, 12):
        chosen = llama.choose(MemorySection(), SHAPE, int(limit))
        assert chosen.peak_bytes <= limit
        costs.append(chosen.relative_cost)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.4  # something was encoded twice


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


@pytest.mark.parametrize("family", ["mpnet", "bert"])
def test_what_transformers_cannot_checkpoint_is_not_planned_so(family: str) -> None:
    planner = make_planner(BIDIRECTIONAL[family](), torch.float32, 48)
    assert planner.max_rows(MemorySection(), SHAPE, 100 * GIB) > 0
    tight = planner.choose(MemorySection(token_budget=48), SHAPE, MARGINS["cpu"] + 2**30)
    assert tight.plan.checkpoint_every == 0
    if family == "mpnet":
        with pytest.raises(ValueError, match=r"checkpointing: got on, but MPNetModel does not"):
            planner.choose(MemorySection(checkpointing="on"), SHAPE, 100 * GIB)
