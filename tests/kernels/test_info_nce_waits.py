"""A call of the loss lets the host wait for nothing that a GPU has queued.

Tensors of the meta device stand for a GPU's (see `syncs`); the Triton path's kernels are recorded.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from launches import recorded
from loss_cases import Case, make_case, option_sets, singles
from lowmem_cft_kernels import Candidates, LossPath, info_nce_loss
from syncs import HostWaits

SETS = option_sets()
TRIED = [*singles(), *(name for name in SETS if name.startswith("a dozen"))]
SHAPE = (37, 53, 16)
GPU = torch.device("meta")


def on_gpu(value: Any) -> Any:
    """The tensors in it, on what stands for a GPU."""
    if isinstance(value, Tensor):
        return value.detach().to(GPU)
    if not dataclasses.is_dataclass(value):
        return value
    held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    moved = {name: on_gpu(tensor) for name, tensor in held.items() if isinstance(tensor, Tensor)}
    return dataclasses.replace(value, **moved)  # type: ignore[type-var]


def case_on_gpu(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """Its candidates validated on the CPU, and then moved as a caller moves them."""
    case = make_case(SETS[name], SHAPE, dtype)
    case.candidates.validate(*SHAPE[:2])
    options = {option: on_gpu(value) for option, value in case.options.items()}
    return Case(on_gpu(case.query_MD), on_gpu(case.doc_ND), case.candidates.to(GPU), options)


def waits(case: Case, path: LossPath, **keywords: Any) -> list[str]:
    kernels = recorded() if path is LossPath.TRITON else nullcontext()
    with kernels, HostWaits() as waits_seen:
        result = case.run(path, **keywords)
        assert result.loss.device == GPU
    return waits_seen.found


@pytest.mark.parametrize("path", [LossPath.CHUNKED, LossPath.TRITON])
@pytest.mark.parametrize("name", TRIED)
def test_nothing_is_waited_for(name: str, path: LossPath) -> None:
    for dtype in (torch.float32, torch.float16):
        case = case_on_gpu(name, dtype)
        for keywords in ({}, {"workspace_bytes": 20_000}, {"temperature": 0.1}):
            assert not waits(case, path, **keywords)


@pytest.mark.parametrize("path", [LossPath.CHUNKED, LossPath.TRITON])
def test_nor_where_autograd_calls(path: LossPath) -> None:
    case = case_on_gpu("tensor temperature")
    leaves = [case.query_MD.requires_grad_(), case.doc_ND.requires_grad_()]
    kernels = recorded() if path is LossPath.TRITON else nullcontext()
    with kernels, HostWaits() as waits_seen:
        loss = info_nce_loss(*leaves, case.candidates, **case.options, path=path)
        loss.backward()  # type: ignore[no-untyped-call]
    assert all(leaf.grad is not None for leaf in leaves)
    assert not waits_seen.found


def test_candidates_are_moved_without_waiting() -> None:
    candidates = make_case(SETS["own negatives + two keys"], SHAPE).candidates
    with HostWaits() as waits_seen:
        moved = candidates.to(GPU)
    assert moved.target.device == moved.doc_keys.device == GPU  # type: ignore[union-attr]
    assert not waits_seen.found


@pytest.mark.parametrize("name", ["plain", "several positives", "own negatives"])
def test_a_caller_that_has_not_validated_waits_once(name: str) -> None:
    """Tensors of the CPU stand for the GPU's, as their values are looked at."""
    case = make_case(SETS[name], SHAPE, torch.float32)
    for wanted in (1, 0, 0):
        with HostWaits("cpu") as waits_seen:
            case.candidates.validate(*SHAPE[:2])
        assert len(waits_seen.found) == wanted
    assert all("masks.py" in line for line in waits_seen.found)


def test_candidates_remember_what_they_are_valid_for() -> None:
    case = make_case(SETS["own negatives"], SHAPE)
    candidates = case.candidates
    case.run(LossPath.CHUNKED)
    for same in (candidates, candidates.to(torch.device("cpu")), candidates.to(GPU)):
        same.validate(*SHAPE[:2])  # on the meta device, no value could be looked at
    with pytest.raises(ValueError, match=r"owner_N: got entries in -1\.\.\d+, wanted 0\.\.4"):
        Candidates(target=candidates.target[:5], owner_N=candidates.owner_N).validate(5, SHAPE[1])
    with pytest.raises(ValueError, match=r"target: got torch.int64 \(37,\), wanted int64 \(36,\)"):
        candidates.validate(36, SHAPE[1])
    short = dataclasses.replace(candidates, owner_N=None, own_only=False)
    with pytest.raises(ValueError, match=r"target: got entries in \d+\.\.\d+, wanted 0\.\.2"):
        short.validate(SHAPE[0], 3)
    short.validate(*SHAPE[:2])
    with pytest.raises(ValueError, match=r"target: got entries in"):
        short.validate(SHAPE[0], 3)
    changed = torch.cat([candidates.target[:-2], torch.tensor([-1, 99])])
    other = dataclasses.replace(short, target=changed)
    with pytest.raises(ValueError, match=r"target: got entries in -1\.\.99"):
        other.validate(*SHAPE[:2])


def test_no_queries_and_no_documents_are_valid() -> None:
    none = torch.empty(0, dtype=torch.int64)
    Candidates(target=none).validate(0, 3)
    Candidates(target=none[:, None].expand(0, 2), owner_N=none).validate(0, 0)
    with pytest.raises(ValueError, match=r"owner_N: got entries in 0\.\.0, wanted 0\.\.-1"):
        Candidates(target=none, owner_N=torch.zeros(1, dtype=torch.int64)).validate(0, 1)
