"""What a call is said to hold, and what it does hold: counted on tensors with and without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from launches import recorded
from loss_cases import SOFTMAXES, Case, Shape, make_case, option_sets, singles
from lowmem_cft.planning.live_bytes import LiveBytes
from lowmem_cft_kernels import (
    Bank,
    Candidates,
    FalseNegatives,
    Hardness,
    LossOptions,
    LossPath,
    Negatives,
    Products,
    split_bytes,
    workspace_bytes,
)
from lowmem_cft_kernels.options import WORKSPACE_BYTES
from lowmem_cft_kernels.problem import make_problem

SETS = option_sets()
TRIED = [*singles(), *(name for name in SETS if name.startswith("a dozen"))]
PLENTY = 2**40
"""More than any call takes."""


def predicted(case: Case, path: LossPath, bound: int) -> int:
    """What `workspace_bytes` says of the case."""
    (num_queries, width), num_docs = case.query_MD.shape, len(case.doc_ND)
    options = LossOptions(**{**case.options, "path": path, "workspace_bytes": bound})
    num_positives = case.candidates.target_MP.shape[1]
    dtype = case.query_MD.dtype
    return workspace_bytes(
        num_queries, num_docs, width, options, dtype=dtype, num_positives=num_positives
    )


def measured(case: Case, path: LossPath, bound: int) -> int:
    """Most bytes of tensors alive at once, beside inputs and gradients."""
    out = tuple(torch.empty(x.shape) for x in (case.query_MD, case.doc_ND))
    kernels = recorded() if path is LossPath.TRITON else nullcontext({})
    with kernels as recorders, LiveBytes([*case.tensors(), *out]) as live:
        case.run(path, workspace_bytes=bound, out=out)
    assert path is LossPath.CHUNKED or sum(kernel.count for kernel in recorders.values()) >= 3
    return live.peak


def some_numbers(case: Case) -> int:
    """Bytes of 16 numbers per pair of a query and a positive, and per document."""
    bank = case.options["bank"]
    count = case.candidates.target.numel() + len(case.doc_ND)
    count += 0 if bank is None else len(bank.doc_CD)
    return 16 * count * torch.float32.itemsize


@pytest.mark.parametrize("name", SETS)
def test_blocks_are_those_of_the_problem(name: str) -> None:
    case = make_case(SETS[name], (7, 11, 6))
    options = LossOptions(**case.options)
    problem = make_problem(case.query_MD, case.doc_ND, case.candidates, options)
    made = [(b.direction, b.rows_per_query, len(b.col_CD)) for b in problem.blocks]
    assert list(problem.extent.blocks()) == made
    guide = problem.blocks[0].guide
    assert problem.extent.guide_width == (0 if guide is None else guide.row_RG.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRIED)
def test_chunked_takes_what_is_said_of_it(name: str, dtype: torch.dtype) -> None:
    """Not a third of it is not used, and where all is worked on at once, more changes nothing."""
    case = make_case(SETS[name], (256, 512, 48), dtype)
    at_once = predicted(case, LossPath.CHUNKED, PLENTY)
    for bound in (2**19, 2**20, at_once):
        most = predicted(case, LossPath.CHUNKED, bound)
        assert most <= bound
        assert most / 3 < measured(case, LossPath.CHUNKED, bound) <= most + some_numbers(case)
    enough = measured(case, LossPath.CHUNKED, at_once)
    assert measured(case, LossPath.CHUNKED, PLENTY) == enough
    assert measured(case, LossPath.CHUNKED, at_once // 4) < enough


# tensors without memory


@pytest.fixture
def without_memory() -> Iterator[None]:
    """Tensors have no numbers: what looks at them is left out, what depends on them is given."""
    with (
        FakeTensorMode(),
        mock.patch.object(LossOptions, "validate", return_value=None),
        mock.patch.object(Candidates, "validate", return_value=None),
    ):
        yield


def integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def large_case(name: str, shape: Shape, dtype: torch.dtype) -> Case:
    """Plain, with other softmaxes, or with these and everything else."""
    num_queries, num_docs, width = shape
    softmaxes, _, everything = name.partition(" ")
    case = make_case(frozenset(), (1, 1, 1), dtype)
    if softmaxes in SOFTMAXES:
        case = case.having(softmaxes=SOFTMAXES[softmaxes])
    query_MD = torch.empty(num_queries, width, dtype=dtype)
    doc_ND = torch.empty(num_docs, width, dtype=dtype)
    if not everything:
        return Case(query_MD, doc_ND, Candidates(target=integers(num_queries)), case.options)
    candidates = Candidates(
        target=integers(num_queries, 3),
        owner_N=integers(num_docs),
        own_only=True,
        query_keys=integers(num_queries, 2),
        doc_keys=integers(num_docs),
    )
    guides = {"query_guide_MG": torch.empty(num_queries, 64, dtype=dtype)}
    guides["doc_guide_NG"] = torch.empty(num_docs, 64, dtype=dtype)
    bank = Bank(
        doc_CD=torch.empty(num_docs // 2, width, dtype=dtype),
        keys_C=integers(num_docs // 2),
        guide_CG=torch.empty(num_docs // 2, 64, dtype=dtype),
    )
    case = case.having(
        false_negatives=FalseNegatives(margin=0.1, **guides),
        hardness=Hardness(strength=3.0, on=Negatives.IN_BATCH),
        weight_M=torch.empty(num_queries),
        bank=bank,
        normalize=True,
    )
    return Case(query_MD, doc_ND, candidates, case.options)


KINDS = [
    *((dtype, Products.EXACT) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    (torch.float32, Products.SPLIT_BF16),
]
LARGE = ["plain", "symmetric", "gte", "symmetric with everything", "gte with everything"]


@pytest.mark.parametrize(("dtype", "products"), KINDS, ids=str)
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.usefixtures("without_memory")
def test_triton_takes_what_is_said_of_it(name: str, dtype: torch.dtype, products: Products) -> None:
    """Not a third of it is not used, halves that are held beside the bound included."""
    case = large_case(name, (8192, 16384, 256), dtype).having(products=products)
    halves = 0
    if products is Products.SPLIT_BF16:
        bank = case.options["bank"]
        halves = split_bytes(8192 + 16384, 256)
        halves += 0 if bank is None else split_bytes(8192, 256) + split_bytes(8192 * 4, 64)
    for bound in (2**24, 2**25, 2**27, PLENTY):
        most = predicted(case, LossPath.TRITON, bound)
        assert halves < most <= bound + halves
        assert most * 2 / 3 < measured(case, LossPath.TRITON, bound) <= most + some_numbers(case)


@pytest.mark.parametrize("name", ["plain", "symmetric", "gte"])
@pytest.mark.usefixtures("without_memory")
def test_64_mib_are_enough_for_the_largest_batch(name: str) -> None:
    """Each matrix of its similarities would take 16 GiB in 16 bit."""
    case = large_case(name, (65_536, 131_072, 2304), torch.bfloat16)
    assert predicted(case, LossPath.TRITON, 0) == WORKSPACE_BYTES
    assert 2**25 < measured(case, LossPath.TRITON, 0) <= 2**26


def test_only_paths_with_a_workspace_are_asked() -> None:
    for path in (None, LossPath.REFERENCE):
        with pytest.raises(ValueError, match=r"options\.path: .* wanted chunked or triton"):
            workspace_bytes(8, 16, 4, LossOptions(temperature=0.1, path=path))
