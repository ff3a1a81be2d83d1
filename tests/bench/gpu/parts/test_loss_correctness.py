"""The part that holds the loss against its formula: wrong losses fail, processes find the same."""

from __future__ import annotations

import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.gpu import loss_cases
from bench.gpu.checks import Checks
from bench.gpu.options import Options
from bench.gpu.parts import loss_correctness


@pytest.mark.parametrize("broken", ["loss", "d_query_MD", "d_doc_ND", "d_temperature", "again"])
def test_a_wrong_loss_fails(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    right, calls = loss_cases.info_nce, []

    def wrong(*args: Any, path: Any, **options: Any) -> Any:
        result = right(*args, path=path, **options)
        if path is loss_correctness.LossPath.REFERENCE:
            return result
        calls.append(path)
        name = "d_doc_ND" if broken == "again" else broken
        if broken == "again" and len(calls) % 2:
            return result
        return replace(result, **{name: getattr(result, name) * (1 + 1e-4)})

    task = ("plain", "float32", "chunked", ((37, 53, 40),), "cpu")
    assert all(value <= bound for _, _, value, bound in loss_correctness.check_set(*task))
    monkeypatch.setattr(loss_cases, "info_nce", wrong)
    failed = [
        kind for kind, _, value, bound in loss_correctness.check_set(*task) if not value <= bound
    ]
    wanted = {"loss": "loss: value, float32", "again": "loss: second run"}
    assert failed == [wanted.get(broken, f"loss: {broken}, float32")]


def test_processes_find_what_one_finds() -> None:
    tasks = [("plain", dtype, "chunked", ((9, 20, 16),), "cpu") for dtype in ("float32", "float16")]
    unknown = ("no such set", *tasks[0][1:])
    with loss_correctness.started(tasks, 0) as waiting:
        alone = [waiting[task](0.0) for task in tasks]
    with loss_correctness.started([unknown, *tasks], 1) as waiting:
        with pytest.raises(KeyError, match="no such set"):
            waiting[unknown](120.0)
        apart = [waiting[task](120.0) for task in tasks]
    assert all(alone)
    for ours, theirs in zip(alone, apart, strict=True):
        assert [(kind, what) for kind, what, _, _ in theirs] == [finding[:2] for finding in ours]
        # Errors are rounding, which differs with a process's number of threads; bounds of 16-bit
        # paths are such errors too.
        assert all(value <= bound for _, _, value, bound in (*ours, *theirs))


def test_a_task_that_breaks_its_process_fails_alone() -> None:
    options = Options(torch.device("cpu"), True, 2**30, 100.0)
    checks = Checks(options)
    tasks = [
        ("plain", dtype, "triton", (), "cuda:0") for dtype in ("float32", "float16", "float64")
    ]

    def breaks(seconds: float) -> Any:
        raise BrokenProcessPool("terminated abruptly")

    waiting = dict.fromkeys(tasks, lambda seconds: [("kind", "name", 0.5, 1.0)])
    waiting[tasks[1]] = breaks
    loss_correctness.add_findings(tasks, waiting, options, checks)
    assert checks.count == 3
    (failed,) = checks.failed
    assert failed["name"] == "plain, float16, triton"
    assert "terminated abruptly" in failed["error"]


def test_there_are_as_many_processes_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(torch.device("cuda", 0), True, 2**30, 100.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for free, wanted in {139: 12, 11: 5, 1: 1}.items():
        both = (free * 2**30, 2**40)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, both=both: both)
        assert loss_correctness.num_workers(options) == wanted
