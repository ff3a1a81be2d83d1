"""The Triton path against the formula, in triton's interpreter.

What is held in bfloat16 is tried in `test_split_products`, how much is held in `test_workspace`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from by_text import drawn_case
from eager import eagerly
from interpreted import Done, Job, interpret
from loss_cases import (
    Case,
    Shape,
    assert_agrees,
    assert_same_bits,
    assert_substantial,
    errors,
    make_case,
    option_sets,
    singles,
)
from lowmem_cft_kernels import (
    SOFTMAXES,
    Bank,
    Candidates,
    FalseNegatives,
    InfoNCEResult,
    LossPath,
)

SETS = option_sets()
ALONE_AND_MANY = [*singles(), *(name for name in SETS if name.startswith("a dozen"))]
WORKSPACES = (1, 20_000, 1 << 25)
MIDDLE = (37, 53, 40)
WIDE = (20, 150, 24)
"""More columns than the narrowest rectangle has."""


def by_reference(case: Case) -> InfoNCEResult:
    """In float64, of the inputs as they were rounded."""
    return case.to(torch.float64).run(LossPath.REFERENCE)


def assert_all_agree(
    jobs: dict[str, Job], done: list[Done], bound: float = 1e-5, *, saturated: bool = False
) -> None:
    """Each with the formula; a failure names its job."""
    for (name, job), job_done in zip(jobs.items(), done, strict=True):
        wanted = by_reference(job.case)
        assert torch.isfinite(wanted.loss)
        if len(job.case.query_MD) > 2 and not saturated:
            assert_substantial(wanted)
        try:
            assert_agrees(job.case, job_done.result, wanted, bound)
        except AssertionError as error:
            raise AssertionError(f"{name}, {job.keywords}: {error}") from error


def launches(done: list[Done], kernel: str) -> int:
    return sum(job_done.launches[kernel] for job_done in done)


# agreement


PARTS = 3


@pytest.mark.parametrize("part", range(PARTS))
def test_every_set_in_float32(part: int, tmp_path: Path) -> None:
    """In small tiles, one or several to a rectangle, and one or several rectangles to a block."""
    names = list(SETS)[part::PARTS]
    jobs = {
        name: Job(
            make_case(SETS[name], WIDE, torch.float32),
            {"workspace_bytes": WORKSPACES[i % 3]},
            rows=(16, None)[i % 2],
        )
        for i, name in enumerate(names)
    }
    assert len(jobs) > 80
    done = interpret(tmp_path, list(jobs.values()), small_tiles=True)
    assert_all_agree(jobs, done)
    for kernel in ("lse_kernel", "gradient_kernel"):
        assert launches(done, kernel) > 3 * len(jobs)
    assert launches(done, "scale_kernel") > 10


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 3, 5), (53, 7, 8), MIDDLE, (16, 24, 2304)])
def test_shapes_alone_and_many(shape: Shape, tmp_path: Path) -> None:
    """In the tiles that are shipped."""
    agree_on(shape, ALONE_AND_MANY, tmp_path)


@pytest.mark.parametrize("shape", [(129, 257, 65), (8, 12, 2560), (3, 1500, 33)])
def test_larger_shapes(shape: Shape, tmp_path: Path) -> None:
    names = ["plain", "symmetric", "normalize", *ALONE_AND_MANY[-5:]]
    assert sum(name.startswith("a dozen") for name in names) == 5
    agree_on(shape, names, tmp_path)


def agree_on(shape: Shape, names: list[str], folder: Path) -> None:
    cases = {name: make_case(SETS[name], shape, torch.float32) for name in names}
    jobs = {
        name: Job(case, {"workspace_bytes": 100_000 << 5 * (i % 2)})
        for i, (name, case) in enumerate(cases.items())
    }
    assert_all_agree(jobs, interpret(folder, list(jobs.values())))


def test_float16_loses_at_most_twice_what_eager_loses(tmp_path: Path) -> None:
    jobs = [
        Job(make_case(SETS[name], MIDDLE, torch.float16), {"workspace_bytes": WORKSPACES[i % 3]})
        for i, name in enumerate(ALONE_AND_MANY)
    ]
    for name, job, job_done in zip(ALONE_AND_MANY, jobs, interpret(tmp_path, jobs), strict=True):
        got, wanted = job_done.result, by_reference(job.case)
        assert got.d_query_MD.dtype == got.loss.dtype == torch.float32
        halves = {x: getattr(got, x).half() for x in ("d_query_MD", "d_doc_ND")}
        ours = errors(job.case, dataclasses.replace(got, **halves), wanted)
        for field, lost in errors(job.case, eagerly(job.case), wanted).items():
            assert lost > 0, "eager is exact: nothing was compared"
            assert ours[field] <= 2 * lost, f"{name}: {field}"


def test_no_positive_is_a_negative_in_any_direction(tmp_path: Path) -> None:
    drawn = [(name, *drawn_case(seed, name)) for name in SOFTMAXES for seed in range(4)]
    done = interpret(tmp_path, [Job(case.to(torch.float32)) for _, case, _ in drawn])
    for (name, _, by_text), job_done in zip(drawn, done, strict=True):
        assert float(job_done.result.loss) == pytest.approx(by_text.loss(name), rel=1e-5)


@pytest.mark.parametrize("scale", [1, 4], ids=["norm 1", "norm 4"])
def test_low_temperature(scale: int, tmp_path: Path) -> None:
    jobs = {}
    for name in ALONE_AND_MANY:
        case = make_case(SETS[name], MIDDLE, torch.float32).having(temperature=0.005)
        case = dataclasses.replace(  # by a power of two: exact
            case, query_MD=case.query_MD * scale, doc_ND=case.doc_ND * scale
        )
        jobs[name] = Job(case, {"workspace_bytes": 50_000})
    # a logit of up to 200 * 1.3^2 * scale^2 is off by a few units in its last place
    bound = 16 * 2**-24 * 1.7 * scale**2 / 0.005
    done = interpret(tmp_path, list(jobs.values()))
    assert_all_agree(jobs, done, bound, saturated=scale > 1)


def test_a_row_that_sees_its_positive_alone_has_no_gradient(tmp_path: Path) -> None:
    """Not even one of rounding: its share of its denominator is 1."""
    jobs = []
    for dtype in (torch.float32, torch.float16):
        case = make_case(SETS["weights"], WIDE, dtype)
        keys = {"query_keys": torch.zeros(WIDE[0]).long(), "doc_keys": torch.zeros(WIDE[1]).long()}
        candidates = dataclasses.replace(case.candidates, **keys)
        jobs.append(Job(dataclasses.replace(case, candidates=candidates), rows=16))
    for job_done in interpret(tmp_path, jobs, small_tiles=True):
        assert job_done.launches["scale_kernel"]
        assert not job_done.result.d_query_MD.any()
        assert not job_done.result.d_doc_ND.any()
        assert abs(float(job_done.result.loss)) < 1e-7


# nothing else is read or written


def test_bits_do_not_depend_on_the_run_nor_on_what_memory_held(tmp_path: Path) -> None:
    """The second run is watched: addresses are arguments', memory holds NaN until written."""
    jobs = []
    for i, name in enumerate(ALONE_AND_MANY):
        dtype = (torch.float32, torch.float16)[i % 2]
        job = Job(
            make_case(SETS[name], WIDE, dtype), {"workspace_bytes": WORKSPACES[i % 3]}, rows=16
        )
        jobs += [job, dataclasses.replace(job, watched=True)]
    done = interpret(tmp_path, jobs, small_tiles=True)
    for first, watched in zip(done[::2], done[1::2], strict=True):
        assert_same_bits(watched.result, first.result)
        assert watched.launches == first.launches
        assert watched.addresses > 10_000
        assert watched.allocated > 4


def inside(x: Tensor) -> Tensor:
    """The same amid a larger buffer that holds NaN, or integers that hide and choose others."""
    filler = torch.nan if x.is_floating_point() else 1
    margins = [(2, 3)] * x.ndim
    buffer = torch.full([a + size + b for size, (a, b) in zip(x.shape, margins, strict=True)], 0)
    buffer = buffer.to(x.dtype).fill_(filler)
    view = buffer[tuple(slice(a, a + size) for size, (a, _) in zip(x.shape, margins, strict=True))]
    return view.copy_(x)


def surrounded(value: Any) -> Any:
    """Tensors in it are inside larger buffers."""
    if isinstance(value, Tensor):
        return inside(value.detach()) if value.ndim else value.detach()
    if isinstance(value, Candidates | FalseNegatives | Bank):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        held = {name: surrounded(getattr(value, name)) for name in names}
        return dataclasses.replace(value, **held)
    return value


def test_inputs_and_gradients_amid_larger_buffers(tmp_path: Path) -> None:
    jobs = {}
    for i, name in enumerate(ALONE_AND_MANY):
        case = make_case(SETS[name], MIDDLE, torch.float32)
        options = {option: surrounded(value) for option, value in case.options.items()}
        case = Case(
            *(surrounded(x) for x in (case.query_MD, case.doc_ND, case.candidates)), options
        )
        assert not case.query_MD.is_contiguous()
        out = tuple(inside(torch.zeros(x.shape)) for x in (case.query_MD, case.doc_ND))
        keywords = {"workspace_bytes": WORKSPACES[i % 3], "out": out}
        jobs[name] = Job(case, keywords, rows=16, watched=True)
    done = interpret(tmp_path, list(jobs.values()))
    assert_all_agree(jobs, done)
    for job_done in done:
        for gradient in (job_done.result.d_query_MD, job_done.result.d_doc_ND):
            storage = gradient.untyped_storage()
            numbers = torch.empty(0).set_(storage)
            assert numbers.numel() == (len(gradient) + 5) * (gradient.shape[1] + 5)
            assert not gradient.isnan().any()
            assert int(numbers.isnan().sum()) == numbers.numel() - gradient.numel()


def test_the_watch_sees_what_lies_beyond(tmp_path: Path) -> None:
    job = Job(make_case(frozenset({"symmetric"}), MIDDLE, torch.float32), watched=True)
    interpret(tmp_path, [job])
    for read_or_written in ("row_ptr", "row_top_ptr"):
        told_less = dataclasses.replace(job, withheld=read_or_written)
        with pytest.raises(AssertionError, match="addresses outside of the arguments"):
            interpret(tmp_path, [told_less])
