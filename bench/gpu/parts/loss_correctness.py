"""The loss against its formula: every set of options in every dtype, and twice."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from bench.gpu.checks import Checks
from bench.gpu.loss_cases import MARGINS, OPTION_SETS, Case, Shape, make_case
from bench.gpu.options import Options
from lowmem_cft_kernels import InfoNCEResult, LossPath, Products

Finding = tuple[str, str, float, float]
"""Kind, name, value and bound of a check."""
Task = tuple[str, str, str, tuple[Shape, ...], str]
"""Option set, dtype, path, shapes, device."""
Findings = Callable[[float], list[Finding]]
"""Waits so many seconds for a task's findings."""

SHAPES: tuple[Shape, ...] = ((37, 53, 40), (129, 257, 65), (1000, 3001, 2304))
SPLIT = Products.SPLIT_BF16.value
"""In the place of a dtype: float32, multiplied on tensor cores as the trainer's are if not normalised."""

_GRADIENTS = ("d_query_MD", "d_doc_ND", "d_temperature")
_WORKERS = 12
"""Processes that compile kernels and check beside each other, where there is memory for them."""

_READING_SECONDS = 10.0
"""Kept for reading what is done: no unfinished task is waited for."""

_WORKER_BYTES = 2 * 2**30
"""What one of them takes of the device, its context included."""


def errors_of(case: Case, got: Sequence[Tensor], exact: InfoNCEResult) -> dict[str, float]:
    """Relative errors of the three gradients, each as a vector.

    The temperature's is a difference of terms: below a tenth of them that tenth counts.
    """
    temperature = float(case.options["temperature"])
    lengths = (1.0, 1.0) if case.options["normalize"] else (_rms(case.query_MD), _rms(case.doc_ND))
    floors = (0.0, 0.0, 0.1 * math.prod(lengths) / temperature**2)
    errors = {}
    for name, value, floor in zip(_GRADIENTS, got, floors, strict=True):
        grad = getattr(exact, name)
        assert float(grad.norm()) > 1e-4, f"{name} is as good as zero: any error would be small"
        errors[name] = float((value.double() - grad).norm()) / max(float(grad.norm()), floor)
    return errors


def _rms(x_RD: Tensor) -> float:
    return float(x_RD.double().square().sum(dim=1).mean().sqrt())


def check_set(
    name: str, dtype: str, path: str, shapes: Sequence[Shape], device: str
) -> list[Finding]:
    """One option set in one dtype by one path, at all shapes."""
    findings: list[Finding] = []
    for shape in shapes:
        exact = make_case(OPTION_SETS[name], shape).to(torch.float64, torch.device(device))
        more: dict[str, Any] = {}
        if dtype == SPLIT:
            exact, more = exact.off_the_grid(), {"products": Products.SPLIT_BF16}
        inputs = torch.float32 if dtype == SPLIT else getattr(torch, dtype)
        case = exact.to(inputs, torch.device(device))
        reference = exact.run(LossPath.REFERENCE)
        got, again = case.run(LossPath(path), **more), case.run(LossPath(path), **more)
        title = f"{path}, {dtype}: {name}, {'x'.join(map(str, shape))}"
        keys = ("loss", *_GRADIENTS)
        same = all(torch.equal(getattr(got, key), getattr(again, key)) for key in keys)
        findings.append(("loss: second run", title, 0.0 if same else 1.0, 0.0))
        for kind, value, bound in _compared(case, got, reference, dtype):
            findings.append((kind, title, value, bound))
    torch.cuda.empty_cache()  # other processes share the device
    return findings


def _compared(
    case: Case, got: InfoNCEResult, reference: InfoNCEResult, dtype: str
) -> Iterator[tuple[str, float, float]]:
    """Kind, value and bound. Logits are not rounded: the value is as exact from 16-bit inputs."""
    bound = 1e-10 if dtype == "float64" else 1e-5
    yield (
        f"loss: value, {dtype}",
        float((got.loss - reference.loss).abs() / reference.loss.abs()),
        bound,
    )
    errors = errors_of(case, [getattr(got, key) for key in _GRADIENTS], reference)
    if dtype in ("float32", "float64"):
        for key, error in errors.items():
            yield f"loss: {key}, {dtype}", error, bound
    else:
        half = case.to(torch.bfloat16, case.query_MD.device) if dtype == SPLIT else case
        eager = errors_of(case, half.by_eager(), reference)
        eager["d_temperature"] = max(eager.values())  # a single number may be right by luck
        for key, error in errors.items():
            yield f"loss: {key}'s error by eager's, {dtype}", error / eager[key], 2.0
    if dtype == SPLIT:
        return  # without a grid, ranks depend on rounding
    for key, value in vars(reference.observed).items():
        if case.options["normalize"] and key in ("accuracy", "mean_rank"):
            continue  # two cosines that are equal by the formula are not after rounding
        yield f"loss: {key}, {dtype}", _difference(getattr(got.observed, key), value), bound


def _difference(got: Tensor, reference: Tensor) -> float:
    """The difference relative to the reference, where that is not small; 0 between two NaN."""
    value, exact = float(got), float(reference)
    if math.isnan(value) and math.isnan(exact):
        return 0.0
    return abs(value - exact) / max(abs(exact), 0.1)


def loss_tasks(options: Options) -> dict[str, list[Task]]:
    """The tasks of each option set."""
    device, shapes = str(options.device), SHAPES[:2] if options.tiny else SHAPES
    ways = [("float32", LossPath.CHUNKED), ("float64", LossPath.CHUNKED)]
    # not asked whether Triton can start: where it cannot, every check of it says so and fails
    fused = LossPath.TRITON if options.cuda else LossPath.CHUNKED
    bfloat16 = not options.cuda or torch.cuda.get_device_capability(options.device) >= (8, 0)
    ways += [("float16", fused), ("bfloat16", fused if bfloat16 else LossPath.CHUNKED)]
    ways += [("float32", fused)] if options.cuda else []
    return {
        name: [
            (name, dtype, path.value, shapes, device)
            for dtype, path in [*ways, *([(SPLIT, fused)] if can_split(name, options) else [])]
        ]
        for name in OPTION_SETS
    }


def can_split(name: str, options: Options) -> bool:
    """The device has bfloat16, and no bound of the set decides by a rounding who is hidden."""
    older = options.cuda and torch.cuda.get_device_capability(options.device) < (8, 0)
    return not older and not OPTION_SETS[name] & (MARGINS | {"guides"})


@contextmanager
def started(tasks: Sequence[Task], workers: int) -> Iterator[dict[Task, Findings]]:
    """Task -> what waits so many seconds for its findings; without workers they are done then.

    A process that failed at a task is given up: after a CUDA error every other task fails in it.
    """
    if not workers:
        yield {task: lambda _, task=task: check_set(*task) for task in tasks}  # type: ignore[misc]
        return
    own = threading.local()

    def run(task: Task) -> list[Finding]:
        if getattr(own, "process", None) is None:
            own.process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            findings: list[Finding] = own.process.submit(check_set, *task).result()
        except Exception:
            own.process.shutdown(wait=False)
            own.process = None
            raise
        return findings

    threads = ThreadPoolExecutor(workers)  # one process each, so that none breaks another's
    try:
        futures = {task: threads.submit(run, task) for task in tasks}
        yield {task: future.result for task, future in futures.items()}
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def num_workers(options: Options) -> int:
    """Processes that there are cores and memory for; none without a GPU."""
    if not options.cuda:
        return 0
    free, _ = torch.cuda.mem_get_info(options.device)
    return max(1, min(_WORKERS, os.cpu_count() or 1, free // _WORKER_BYTES))


def check(options: Options) -> dict[str, Any]:
    """Every option set against the formula in float64, in every dtype, and twice."""
    checks, tasks = Checks(options), loss_tasks(options)
    everything = [task for of_set in tasks.values() for task in of_set]
    with started(everything, num_workers(options)) as waiting:
        for name, of_set in tasks.items():
            group = partial(add_findings, of_set, waiting)
            checks.group(f"loss: {name}", group)
    return checks.to_json()


def add_findings(
    tasks: Sequence[Task],
    waiting: dict[Task, Findings],
    options: Options,
    checks: Checks,
) -> None:
    """Wait for the tasks, and take what they found into the checks."""
    for task in tasks:
        try:
            # what is done when time is over is read still, of this option set and of the others
            findings = waiting[task](max(0.0, options.left - _READING_SECONDS))
        except Exception as error:
            checks.fails("loss: not checked", error, name=", ".join(task[:3]))
            continue
        for finding in findings:
            checks.at_most(*finding)
