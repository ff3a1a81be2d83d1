"""Bytes that the chunked path holds, counted; the same measures see what the formula holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from loss_cases import Case, make_case, option_sets, singles
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft_kernels import LossPath

SETS = option_sets()
TRIED = [*singles(), *(name for name in SETS if name.startswith("a dozen"))]
WORKSPACE = 2 * 2**20
SHAPE = (1024, 2048, 16)  # one matrix of float32 takes four times the workspace


def few_numbers(case: Case) -> int:
    """Bytes of 16 numbers per pair of a query and a positive, per document and per bank document."""
    bank = case.options["bank"]
    count = case.candidates.target.numel() + len(case.doc_ND)
    count += 0 if bank is None else len(bank.doc_CD)
    return 16 * count * torch.float32.itemsize


def with_out(case: Case, path: LossPath, workspace_bytes: int) -> tuple[Callable[[], object], Any]:
    """The call with its gradients' memory given, and that memory."""
    out = tuple(torch.empty(x.shape) for x in (case.query_MD, case.doc_ND))
    return lambda: case.run(path, workspace_bytes=workspace_bytes, out=out), out


def live_bytes(case: Case, path: LossPath, workspace_bytes: int) -> int:
    """Most bytes of tensors alive at once, beside inputs and gradients."""
    call, out = with_out(case, path, workspace_bytes)
    with LiveBytes([*case.tensors(), *out]) as live:
        call()
    return live.peak


def allocated_bytes(case: Case, path: LossPath, workspace_bytes: int) -> int:
    """The same, with what torch's operations allocate inside themselves."""
    call, _ = with_out(case, path, workspace_bytes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    profiler: Any = record.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "no allocation was recorded"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert held >= 0
    return peak


@pytest.mark.parametrize("name", TRIED)
def test_chunked_stays_within_its_workspace(name: str) -> None:
    case = make_case(SETS[name], SHAPE, torch.float32)
    peak = allocated_bytes(case, LossPath.CHUNKED, WORKSPACE)
    assert WORKSPACE / 4 < peak <= WORKSPACE + few_numbers(case)


@pytest.mark.parametrize("name", TRIED)
def test_16_bit_inputs_are_not_widened_as_a_whole(name: str) -> None:
    case = make_case(SETS[name], SHAPE, torch.bfloat16)
    peak = live_bytes(case, LossPath.CHUNKED, WORKSPACE)
    assert WORKSPACE / 4 < peak <= WORKSPACE + few_numbers(case)


@pytest.mark.parametrize("name", ["plain", "symmetric"])
def test_a_batch_of_thousands(name: str) -> None:
    case = make_case(SETS[name], (4096, 8192, 64), torch.float32)
    peak = live_bytes(case, LossPath.CHUNKED, 2**25)
    assert 2**25 / 4 < peak <= 2**25 + few_numbers(case)


def test_workspace_bounds_it_whatever_its_size() -> None:
    case = make_case(SETS["symmetric"], SHAPE, torch.float32)
    peaks = [live_bytes(case, LossPath.CHUNKED, 2**k) for k in (18, 20, 22, 24)]
    assert peaks == sorted(peaks)
    assert all(
        peak <= 2**k + few_numbers(case) for k, peak in zip((18, 20, 22, 24), peaks, strict=True)
    )
    assert peaks[-1] > 8 * peaks[0]


@pytest.mark.parametrize("measure", [live_bytes, allocated_bytes])
def test_the_measures_see_whole_matrices(measure: Callable[[Case, LossPath, int], int]) -> None:
    case = make_case(SETS["plain"], SHAPE, torch.float32)
    matrix = 1024 * 2048 * 4
    assert measure(case, LossPath.REFERENCE, WORKSPACE) > 2 * matrix
    assert measure(case, LossPath.CHUNKED, 2**30) > matrix
