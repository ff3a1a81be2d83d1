"""Memory that runs out anywhere in a step changes its plan and not its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_cft.gradient import oom
from lowmem_cft.gradient.embedding_cache import EmbeddingCache
from lowmem_cft.gradient.oom import DoesNotFit, is_out_of_memory, try_in_memory
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft_kernels import LearnedTemperature, info_nce
from numerics import assert_same
from plain import make_batch, make_encoder, plain_gradients, planned_gradients

BATCH = make_batch(6, 2, texts=14, longest=12, seed=3)
PLANS = {
    "none kept": StepPlan(backward_tokens=30, forward_tokens=60),
    "some kept": StepPlan(backward_tokens=20, forward_tokens=60, kept_tokens=60),
    "all kept": StepPlan(backward_tokens=30, forward_tokens=60, kept_tokens=None),
    "checkpointed": StepPlan(
        backward_tokens=20, forward_tokens=60, kept_tokens=40, checkpoint_every=1
    ),
}


@pytest.fixture(autouse=True)
def _no_full_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection looks at all of the test session's objects, and there are no cycles to free."""
    monkeypatch.setattr(oom.gc, "collect", lambda: 0)


class FailAt(TorchDispatchMode):
    """Runs out of memory at the k-th operation that makes floating-point numbers, once."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.left = k

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        in_place = str(func).split(".")[1].endswith("_")
        floats = [
            leaf
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if floats and not in_place:  # what works in place allocates nothing
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory: injected")
        return result


def run(plan: StepPlan, k: int = 0) -> tuple[dict[str, Tensor], StepPlan, int]:
    """Gradients and plan of a step failing at operation k (never, for 0), and operations done.

    The temperature is learned, and its gradient is one of them.
    """
    encoder = make_encoder(dropout=0.2)
    texts = BATCH.texts(twins_once=True)
    mode, temperature = FailAt(k), LearnedTemperature(0.1).double()
    found, report = planned_gradients(
        encoder, BATCH, texts, plan, during=mode, temperature=temperature
    )
    assert temperature.raw.grad is not None
    return {**found, "temperature": temperature.raw.grad}, report.plan, -mode.left


def plain() -> dict[str, Tensor]:
    """What `run` has to find, without a plan."""
    encoder, temperature = make_encoder(dropout=0.2), LearnedTemperature(0.1).double()
    texts = BATCH.texts(twins_once=True)
    found = plain_gradients(encoder, BATCH, texts, temperature=temperature())
    assert temperature.raw.grad is not None
    return {**found, "temperature": temperature.raw.grad}


@pytest.mark.parametrize("name", PLANS)
def test_a_failure_anywhere_leaves_the_gradient(name: str) -> None:
    plan = PLANS[name]
    wanted = plain()
    whole, same, total = run(plan)
    assert same == plan
    assert_same(whole, wanted, 1e-10)
    changed = set()
    for k in range(1, total + 1, max(1, total // 20)):
        got, now, _ = run(plan, k)
        assert now != plan, f"the plan took no notice of the failure at operation {k}"
        assert_same(got, wanted, 1e-10)
        changed |= {key for key, value in now.to_json().items() if value != plan.to_json()[key]}
    if plan.kept_tokens != 0:
        assert "kept_tokens" in changed
    if plan.kept_tokens is not None:
        assert {"backward_tokens", "forward_tokens"} <= changed


def test_budgets_sink_until_chunks_fit_and_stay_there() -> None:
    """A device that holds 9 tokens with a graph and 20 without."""
    encoder = make_encoder()
    texts = BATCH.texts(twins_once=True)
    embed = encoder.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        room = 9 if torch.is_grad_enabled() else 20
        if kwargs["input_ids"].numel() > room:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: no")
        return embed(*args, **kwargs)

    encoder.model.forward = forward
    longest = int(BATCH.store.lengths[texts.text_P].max())
    assert longest > 9
    plan = StepPlan(backward_tokens=64, forward_tokens=64, kept_tokens=None)
    with pytest.raises(DoesNotFit, match=rf"a single text of {longest} tokens.*text.max_tokens"):
        planned_gradients(encoder, BATCH, texts, plan)

    short = make_batch(6, 2, texts=14, longest=8, seed=3)
    texts = short.texts(twins_once=True)
    got, report = planned_gradients(encoder, short, texts, plan)
    assert report.plan.backward_tokens <= 9
    assert report.plan.kept_tokens == 0
    again, second = planned_gradients(encoder, short, texts, report.plan)
    assert second.plan == report.plan
    encoder.model.forward = embed
    wanted = plain_gradients(encoder, short, texts)
    assert_same(got, wanted, 1e-10)
    assert_same(again, wanted, 1e-10)


def test_a_loss_that_is_computed_again_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out when all of the loss is done but its report."""
    from lowmem_cft.gradient import step

    workspaces = []

    def fails_twice(*args: Any, workspace_bytes: int, **kwargs: Any) -> Any:
        workspaces.append(workspace_bytes)
        result = info_nce(*args, workspace_bytes=workspace_bytes, **kwargs)
        if len(workspaces) <= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(step, "info_nce", fails_twice)
    got, _, _ = run(StepPlan(backward_tokens=30, forward_tokens=60))
    assert workspaces == [2**25, 2**24, 2**23]
    assert_same(got, plain(), 1e-10)


def test_memory_that_runs_out_after_the_loss_counts_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The temperature's gradient is there already when the embeddings' is put away."""
    keep, failed = EmbeddingCache.keep_gradient, []

    def fails_once(self: EmbeddingCache, d_emb_SD: Tensor) -> None:
        if not failed:
            failed.append(d_emb_SD)
            raise torch.OutOfMemoryError("CUDA out of memory")
        keep(self, d_emb_SD)

    monkeypatch.setattr(EmbeddingCache, "keep_gradient", fails_once)
    got, _, _ = run(StepPlan(backward_tokens=30, forward_tokens=60))
    assert failed
    assert_same(got, plain(), 1e-10)


def test_a_loss_that_never_fits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem_cft.gradient import step

    workspaces = []

    def no_room(*args: Any, workspace_bytes: int, **kwargs: Any) -> None:
        workspaces.append(workspace_bytes)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "info_nce", no_room)
    plan = StepPlan(backward_tokens=30, forward_tokens=60, kept_tokens=None)
    with pytest.raises(DoesNotFit, match=r"train\.logical_batch"):
        planned_gradients(make_encoder(), BATCH, BATCH.texts(twins_once=True), plan)
    assert 2**20 <= workspaces[-1] < workspaces[0]


def test_other_errors_are_not_swallowed() -> None:
    def wrong() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        try_in_memory(wrong)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(MemoryError())
