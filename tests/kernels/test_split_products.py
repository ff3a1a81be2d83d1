"""float32 embeddings multiplied as bfloat16 halves: the halves, their products and their loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from eager import rounding
from interpreted import Job, interpret
from loss_cases import (
    Case,
    assert_agrees,
    assert_same_bits,
    errors,
    make_case,
    option_sets,
    singles,
)
from lowmem_cft_kernels import InfoNCEResult, LossPath, Products, info_nce_loss, split_bytes, tiles
from lowmem_cft_kernels.split import split

SETS = option_sets()
ALONE_AND_MANY = [*singles(), *(name for name in SETS if name.startswith("a dozen"))]
SPLIT = {"products": Products.SPLIT_BF16}
GRADIENTS = ("d_query_MD", "d_doc_ND")


def split_products(row_RD: torch.Tensor, col_CD: torch.Tensor) -> torch.Tensor:
    """(R, C) float32: the products that split embeddings have, by three plain ones."""
    row_high, row_low = split(row_RD).float().unbind(dim=1)
    col_high, col_low = split(col_CD).float().unbind(dim=1)
    return row_high @ col_high.T + row_high @ col_low.T + row_low @ col_high.T


def drawn(rows: int, width: int, seed: int) -> torch.Tensor:
    """float32 of norm 1, in the mean."""
    x_RD = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return x_RD / width**0.5


@pytest.mark.parametrize("width", [1, 64, 65, 576])
def test_halves(width: int) -> None:
    x_RD = drawn(7, width, 0)
    halves_R2W = split(x_RD)
    assert halves_R2W.nbytes == split_bytes(7, width)
    assert halves_R2W.shape[2] % 64 == 0
    assert halves_R2W.shape[2] < width + 64
    assert not halves_R2W[:, :, width:].any()
    high_RD, low_RD = halves_R2W[:, :, :width].unbind(dim=1)
    assert torch.equal(high_RD, x_RD.bfloat16())
    left_RD = x_RD.double() - high_RD.double() - low_RD.double()
    assert 0 < float((left_RD.abs() / x_RD.double().abs()).max()) <= 2**-17


def test_split_bytes_are_those_of_float32() -> None:
    assert split_bytes(1000, 2304) == 1000 * 2304 * 4


@pytest.mark.parametrize("width", [40, 576, 2304])
def test_products_are_close_to_those_of_float32(width: int) -> None:
    """Off by at most 2^-15 of each product of two numbers."""
    row_RD, col_CD = drawn(33, width, 1), drawn(45, width, 2)
    wanted_RC = row_RD.double() @ col_CD.double().T
    size_RC = row_RD.double().abs() @ col_CD.double().abs().T
    error_RC = (split_products(row_RD, col_CD).double() - wanted_RC).abs()
    assert bool((error_RC <= 2**-15 * size_RC).all())
    high_RC = row_RD.bfloat16().double() @ col_CD.bfloat16().double().T
    assert float(error_RC.norm()) < 0.01 * float((high_RC - wanted_RC).norm())


def check_in_interpreter(cases: dict[str, Case], folder: Path, **keywords: Any) -> None:
    """Loss as that of float32; of gradients, at most twice what rounding d similarity costs.

    Thrice with one pass, where exponentials are rounded before: if two numbers make a row, the
    errors of d similarity cancel and theirs do not.
    """
    small_tiles = keywords.pop("small_tiles", False)
    jobs = [
        Job(case, {**SPLIT, "workspace_bytes": (1, 20_000, 1 << 25)[i % 3]}, **keywords)
        for i, case in enumerate(cases.values())
    ]
    done = interpret(folder, jobs, small_tiles=small_tiles)
    for kernel in ("gradient_kernel", "scale_kernel"):
        assert sum(job_done.launches[kernel] > 0 for job_done in done) > len(done) / 5
    for (name, case), job_done in zip(cases.items(), done, strict=True):
        wanted = case.to(torch.float64).run(LossPath.REFERENCE)
        ours = errors(case, job_done.result, wanted)
        lost = errors(case, rounding(case), wanted)
        factor = 3 if job_done.launches["scale_kernel"] else 2
        for field in GRADIENTS:
            assert 0 < ours[field] <= factor * lost[field], f"{name}: {field}"
        assert ours["loss"] <= 2e-6, name
        # a sum of products of the gradient, whose errors cancel in part
        assert ours["d_temperature"] <= 2**-8, name
        gradients = {field: getattr(wanted, field) for field in (*GRADIENTS, "d_temperature")}
        exact = InfoNCEResult(**{**vars(job_done.result), **gradients})
        assert_agrees(case, exact, wanted, 2e-5)


@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_every_option(temperature: float, tmp_path: Path) -> None:
    """In the tiles that are shipped."""
    cases = {name: make_case(SETS[name], (37, 53, 40), torch.float32) for name in ALONE_AND_MANY}
    if temperature != 0.2:
        cases = {name: case.having(temperature=temperature) for name, case in cases.items()}
    check_in_interpreter(cases, tmp_path)


def test_many_tiles_and_rectangles_watched(tmp_path: Path) -> None:
    names = ALONE_AND_MANY[::3]
    cases = {name: make_case(SETS[name], (20, 150, 72), torch.float32) for name in names}
    check_in_interpreter(cases, tmp_path, small_tiles=True, rows=16, watched=True)


def test_low_halves_count_in_gradients(tmp_path: Path) -> None:
    """In two passes nothing is lost but by rounding d similarity; high halves lose 1.6 times it."""
    case = make_case(SETS["plain"], (32, 512, 40), torch.float32).having(temperature=1.0)
    shared_D = 2 * F.normalize(drawn(1, 40, 3), dim=1)
    case = replace(case, query_MD=case.query_MD + shared_D, doc_ND=case.doc_ND + shared_D)
    (done,) = interpret(tmp_path, [Job(case, {**SPLIT, "workspace_bytes": 1})])
    assert done.launches["gradient_kernel"]
    wanted = case.to(torch.float64).run(LossPath.REFERENCE)
    ours, lost = errors(case, done.result, wanted), errors(case, rounding(case), wanted)
    for field in GRADIENTS:
        assert 0 < ours[field] <= 1.1 * lost[field]


def test_other_paths_are_exact() -> None:
    case = make_case(SETS["symmetric + normalize"], (17, 29, 24), torch.float32)
    for path in (LossPath.CHUNKED, LossPath.REFERENCE):
        assert_same_bits(case.run(path, **SPLIT), case.run(path))


def test_through_autograd() -> None:
    case = make_case(SETS["plain"], (7, 11, 6), torch.float32)
    query_MD = case.query_MD.clone().requires_grad_()
    loss = info_nce_loss(query_MD, case.doc_ND, case.candidates, temperature=0.2, **SPLIT)
    (d_query_MD,) = torch.autograd.grad(loss, query_MD)
    assert torch.equal(d_query_MD, case.run(path=LossPath.CHUNKED).d_query_MD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_only_float32_can_be_split(dtype: torch.dtype) -> None:
    case = make_case(SETS["plain"], (7, 11, 6), dtype)
    with pytest.raises(ValueError, match=f"got split-bf16 for {dtype}, wanted float32"):
        case.run(**SPLIT)


def test_no_products_of_another_name() -> None:
    case = make_case(SETS["plain"], (7, 11, 6), torch.float32)
    with pytest.raises(ValueError, match="products: got 'bf16', wanted of"):
        case.run(products="bf16")


def test_an_old_device_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "capability_of", lambda device: 75)
    case = make_case(SETS["plain"], (7, 11, 6), torch.float32)
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0, and the device has 7\.5"):
        case.run(**SPLIT)
    case.run(products=Products.EXACT)
