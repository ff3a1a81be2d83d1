"""The counter that predictions are held against, against torch's own record."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.planning.live_bytes import LiveBytes
from measured_steps import make_base, make_batch, measured_bytes, wide_config
from plain import make_encoder, planned_gradients


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
    """In a process of its own: the allocator also records what a test before left to be freed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        counted, allocated = pool.submit(counted_and_allocated).result()
    assert 0.97 <= counted / allocated <= 1.01  # operations hold a little inside themselves


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    known = torch.empty(1000)
    with LiveBytes([known]) as live:
        views = [known[:10], known.view(10, 100)]
        assert live.now == 0
        made = torch.zeros(100)
        views += [made[:50], made.view(10, 10)]
        assert live.now == made.nbytes == 400
        del made, views
        assert live.now == 0
        torch.zeros(25)
    assert (live.now, live.peak) == (0, 400)
