"""InfoNCE: the formula against loops, the chunked path against the formula, memory, errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lowmem_cft_kernels import Candidates, InfoNCEResult, Path, info_nce
from lowmem_cft_kernels import chunked as chunked_module
from lowmem_cft_kernels.chunked import WORKSPACE_BYTES, info_nce_value_and_grad, rows_per_block
from lowmem_cft_kernels.masks import SHARED
from lowmem_cft_kernels.reference import info_nce_loss
from numerics import relative_error

Shape = tuple[int, int, int]
Case = tuple[Tensor, Tensor, Candidates]

SMALL: list[Shape] = [(1, 1, 4), (2, 3, 5), (5, 3, 4), (7, 11, 6)]
SHAPES: list[Shape] = [(1, 1, 4), (2, 3, 5), (53, 37, 8), (37, 53, 40), (129, 257, 65)]
OPTIONS = pytest.mark.parametrize(
    ("symmetric", "owner", "keys"),
    [
        pytest.param(
            s, o, k, id=f"{'both ways' if s else 'one way'}-{o or 'shared'}-{k or 'plain'}"
        )
        for s in (False, True)
        for o in ("", "own")
        for k in ("", "keys")
    ],
)


def shape_id(shape: Shape) -> str:
    return "x".join(map(str, shape))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_case(
    shape: Shape, owner: str = "", keys: str = "", dtype: torch.dtype = torch.float64
) -> Case:
    """Unit vectors; targets and keys repeat, owned documents may be targets."""
    num_queries, num_docs, width = shape
    draw = generator(17)

    def integers(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=draw)

    def normal(count: int) -> Tensor:
        return torch.randn(count, width, generator=draw, dtype=torch.float64)

    target_M = integers(0, num_docs, num_queries)
    query_MD, doc_ND = normal(num_queries), normal(num_docs)
    query_MD[::2] += 2 * doc_ND[target_M[::2]]  # half of the queries are near their positive
    query_MD, doc_ND = (
        torch.nn.functional.normalize(vectors, dim=1).to(dtype) for vectors in (query_MD, doc_ND)
    )
    owner_N = query_key_M = doc_key_N = None
    if owner:
        shared_N = torch.rand(num_docs, generator=draw) < 0.5
        owner_N = integers(0, num_queries, num_docs).masked_fill(shared_N, SHARED)
    if keys:
        doc_key_N = integers(0, 1 + num_docs // 2, num_docs)
        query_key_M = doc_key_N[target_M]
    candidates = Candidates(
        target_M=target_M, owner_N=owner_N, query_key_M=query_key_M, doc_key_N=doc_key_N
    )
    return query_MD, doc_ND, candidates


def chunked(
    case: Case, temperature: float, symmetric: bool, workspace_bytes: int = WORKSPACE_BYTES
) -> dict[str, Tensor]:
    loss, d_query_MD, d_doc_ND, d_temperature, num_first = info_nce_value_and_grad(
        *case, temperature=temperature, symmetric=symmetric, workspace_bytes=workspace_bytes
    )
    return {
        "loss": loss,
        "d_query": d_query_MD,
        "d_doc": d_doc_ND,
        "d_temperature": d_temperature,
        "num_first": num_first,
    }


def in_float64(case: Case) -> Case:
    return case[0].double(), case[1].double(), case[2]


def values(result: InfoNCEResult) -> dict[str, Tensor]:
    return {
        "loss": result.loss,
        "d_query": result.d_query_MD,
        "d_doc": result.d_doc_ND,
        "d_temperature": result.d_temperature,
        "num_first": (result.accuracy * len(result.d_query_MD)).round(),
    }


def by_reference(case: Case, temperature: float, symmetric: bool) -> dict[str, Tensor]:
    return values(
        info_nce(*case, temperature=temperature, symmetric=symmetric, path=Path.REFERENCE)
    )


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.isfinite(got[name]).all(), name
        assert got[name].shape == tensor.shape, name
        error = relative_error(got[name], tensor)
        assert error <= bound, f"{name}: relative error {error:.3e}, wanted at most {bound:.0e}"


def assert_substantial(found: dict[str, Tensor]) -> None:
    """All zeros would agree with anything."""
    for name in ("loss", "d_query", "d_doc", "d_temperature"):
        assert float(found[name].abs().max()) > 1e-3, name


# --- the formula ------------------------------------------------------------------------------


def sees(candidates: Candidates, i: int, j: int) -> bool:
    if j == int(candidates.target_M[i]):
        return True
    if candidates.owner_N is not None and int(candidates.owner_N[j]) not in (SHARED, i):
        return False
    if candidates.query_key_M is None or candidates.doc_key_N is None:
        return True
    return int(candidates.query_key_M[i]) != int(candidates.doc_key_N[j])


def loss_by_loops(case: Case, temperature: float, symmetric: bool) -> tuple[float, int]:
    """Loss and number of queries that rank their positive first, in plain Python."""
    queries, docs, candidates = case[0].tolist(), case[1].tolist(), case[2]

    def score(i: int, j: int) -> float:
        return math.fsum(a * b for a, b in zip(queries[i], docs[j], strict=True)) / temperature

    row_losses, column_losses, num_first = [], [], 0
    for i in range(len(queries)):
        target = int(candidates.target_M[i])
        positive = score(i, target)
        row = [score(i, j) for j in range(len(docs)) if sees(candidates, i, j)]
        row_losses.append(-math.log(math.exp(positive) / math.fsum(map(math.exp, row))))
        num_first += positive == max(row)
        column = [score(k, target) for k in range(len(queries)) if sees(candidates, k, target)]
        column_losses.append(-math.log(math.exp(positive) / math.fsum(map(math.exp, column))))
    loss = math.fsum(row_losses) / len(row_losses)
    if symmetric:
        loss = (loss + math.fsum(column_losses) / len(column_losses)) / 2
    return loss, num_first


@OPTIONS
@pytest.mark.parametrize("shape", SMALL, ids=shape_id)
def test_reference_equals_loops(shape: Shape, symmetric: bool, owner: str, keys: str) -> None:
    case = make_case(shape, owner, keys)
    wanted, num_first = loss_by_loops(case, 0.2, symmetric)
    got = info_nce(*case, temperature=0.2, symmetric=symmetric, path=Path.REFERENCE)
    assert float(got.loss) == pytest.approx(wanted, rel=1e-13, abs=1e-14)
    assert round(float(got.accuracy) * shape[0]) == num_first
    if shape == (7, 11, 6):
        assert wanted > 0.1
        assert 0 < num_first < shape[0]


def test_options_of_the_cases_matter() -> None:
    losses = {
        loss_by_loops(make_case((7, 11, 6), owner, keys), 0.2, symmetric)[0]
        for owner in ("", "own")
        for keys in ("", "keys")
        for symmetric in (False, True)
    }
    assert len(losses) == 8


@OPTIONS
def test_gradient_of_reference(symmetric: bool, owner: str, keys: str) -> None:
    query_MD, doc_ND, candidates = make_case((5, 7, 3), owner, keys)
    temperature = torch.tensor(0.3, dtype=torch.float64)

    def loss(query_MD: Tensor, doc_ND: Tensor, temperature: Tensor) -> Tensor:
        return info_nce_loss(
            query_MD, doc_ND, candidates, temperature=temperature, symmetric=symmetric
        )

    inputs = [tensor.requires_grad_() for tensor in (query_MD, doc_ND, temperature)]
    assert torch.autograd.gradcheck(loss, inputs)
    result = info_nce(
        query_MD, doc_ND, candidates, temperature=0.3, symmetric=symmetric, path=Path.REFERENCE
    )
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    assert_substantial(values(result))
    for got, gradient in zip(
        (result.d_query_MD, result.d_doc_ND, result.d_temperature), wanted, strict=True
    ):
        assert torch.equal(got, gradient)


# --- who sees what ----------------------------------------------------------------------------


def test_hidden_by_hand() -> None:
    target_M = torch.tensor([0, 1, 0])
    owner_N = torch.tensor([2, SHARED, SHARED, 0, 2])
    query_key_M, doc_key_N = torch.tensor([8, 9, 5]), torch.tensor([8, 9, 8, 7, 5])

    def hidden(**options: Tensor) -> list[list[int]]:
        found = Candidates(target_M=target_M, **options).hidden(slice(0, 3))
        assert found is not None
        assert found.dtype == torch.bool
        return found.int().tolist()

    assert Candidates(target_M=target_M).hidden(slice(0, 3)) is None
    assert hidden(owner_N=owner_N) == [[0, 0, 0, 0, 1], [1, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    keys = {"query_key_M": query_key_M, "doc_key_N": doc_key_N}
    assert hidden(**keys) == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    both = [[0, 0, 1, 0, 1], [1, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert hidden(owner_N=owner_N, **keys) == both


@pytest.mark.parametrize("size", [1, 3, 7])
def test_hidden_of_some_rows_is_a_part_of_all(size: int) -> None:
    _, _, candidates = make_case((7, 11, 6), "own", "keys")
    whole = candidates.hidden(slice(0, 7))
    assert whole is not None
    assert 0 < int(whole.sum()) < whole.numel()
    parts = [candidates.hidden(slice(i, min(i + size, 7))) for i in range(0, 7, size)]
    assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)


def test_candidates_move() -> None:
    device = torch.device("meta")
    moved = make_case((2, 3, 5), "own", "keys")[2].to(device)
    assert moved.target_M.device == device
    for vector in (moved.owner_N, moved.query_key_M, moved.doc_key_N):
        assert vector is not None
        assert vector.device == device
    assert make_case((2, 3, 5))[2].to(device).owner_N is None


# --- the chunked path -------------------------------------------------------------------------

BLOCKS = pytest.mark.parametrize("rows", [1, 5, 0], ids=["one row", "five rows", "all rows"])


def workspace_for(rows: int, num_docs: int, itemsize: int) -> int:
    """Bytes that make blocks of so many rows; 0 rows is the default workspace."""
    if not rows:
        return WORKSPACE_BYTES
    found = 3 * rows * num_docs * itemsize
    assert rows_per_block(num_docs, itemsize, found) == rows
    return found


@BLOCKS
@OPTIONS
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_chunked_equals_reference(
    shape: Shape,
    dtype: torch.dtype,
    bound: float,
    symmetric: bool,
    owner: str,
    keys: str,
    rows: int,
) -> None:
    case = make_case(shape, owner, keys, dtype)
    got = chunked(case, 0.05, symmetric, workspace_for(rows, shape[1], dtype.itemsize))
    wanted = by_reference(in_float64(case), 0.05, symmetric)
    assert_close(got, wanted, bound)
    assert all(got[name].dtype == dtype for name in got if name != "num_first")
    if shape[0] > 2:
        assert_substantial(wanted)
        assert 0 < int(wanted["num_first"]) < shape[0]
    if shape == (1, 1, 4):
        assert not any(got[name].any() for name in got if name != "num_first")


def test_a_tiny_workspace_still_takes_one_row() -> None:
    assert rows_per_block(1000, 4, workspace_bytes=1) == 1
    case = make_case((7, 11, 6))
    assert_close(chunked(case, 0.1, True, workspace_bytes=1), by_reference(case, 0.1, True), 1e-12)


@pytest.mark.parametrize("path", Path)
def test_result_of_the_public_call(path: Path) -> None:
    query_MD, doc_ND, candidates = make_case((7, 11, 6), "own", "keys", torch.bfloat16)
    query_MD.requires_grad_()
    result = info_nce(query_MD, doc_ND, candidates, temperature=0.1, path=path)
    assert result.path is path
    found = [getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "path"]
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in found)
    assert query_MD.grad is None
    num_first = loss_by_loops((query_MD, doc_ND, candidates), 0.1, False)[1]
    assert 0 < num_first < 7
    assert torch.equal(result.accuracy, torch.tensor(num_first / 7))


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_lose_at_most_twice_what_eager_loses(
    dtype: torch.dtype, symmetric: bool, owner: str, keys: str
) -> None:
    case = make_case((37, 53, 40), owner, keys, dtype)
    wanted = by_reference(in_float64(case), 0.05, symmetric)
    got = chunked(case, 0.05, symmetric)
    query_MD, doc_ND = (tensor.clone().requires_grad_() for tensor in case[:2])
    loss = info_nce_loss(query_MD, doc_ND, case[2], temperature=0.05, symmetric=symmetric)
    d_query_MD, d_doc_ND = torch.autograd.grad(loss, (query_MD, doc_ND))
    assert d_query_MD.dtype == dtype
    eager = {"loss": loss.detach(), "d_query": d_query_MD, "d_doc": d_doc_ND}
    for name, tensor in eager.items():
        lost = relative_error(tensor, wanted[name])
        assert lost > 0, "eager is exact: nothing was compared"
        assert relative_error(got[name], wanted[name]) <= 2 * lost, name
    # no logit is ever rounded: the same bits as with the inputs widened first
    widened = chunked((case[0].float(), case[1].float(), case[2]), 0.05, symmetric)
    assert all(torch.equal(got[name], widened[name]) for name in widened)


@OPTIONS
@pytest.mark.parametrize("norm", [1, 4], ids=["unit vectors", "norm 4"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
def test_low_temperature(
    dtype: torch.dtype, norm: int, symmetric: bool, owner: str, keys: str
) -> None:
    query_MD, doc_ND, candidates = make_case((37, 53, 40), owner, keys, dtype)
    case = (query_MD * norm, doc_ND * norm, candidates)  # a power of two: exact
    wanted = by_reference(in_float64(case), 0.005, symmetric)
    assert float(wanted["loss"]) > 10
    got = chunked(case, 0.005, symmetric, workspace_for(5, 53, 4))
    # a logit of up to 200 norm^2 is off by a few units in its last place
    assert_close(got, wanted, 16 * 2**-24 * norm**2 / 0.005)


# --- properties -------------------------------------------------------------------------------


@OPTIONS
@pytest.mark.parametrize("path", Path)
def test_order_of_documents_changes_nothing(
    path: Path, symmetric: bool, owner: str, keys: str
) -> None:
    query_MD, doc_ND, candidates = make_case((37, 53, 40), owner, keys)
    order_N = torch.randperm(53, generator=generator(2))
    place_N = order_N.argsort()
    vectors = {
        name: None if vector is None else vector[order_N]
        for name, vector in (("owner_N", candidates.owner_N), ("doc_key_N", candidates.doc_key_N))
    }
    shuffled = dataclasses.replace(candidates, target_M=place_N[candidates.target_M], **vectors)
    got = values(
        info_nce(
            query_MD, doc_ND[order_N], shuffled, temperature=0.1, symmetric=symmetric, path=path
        )
    )
    wanted = values(
        info_nce(query_MD, doc_ND, candidates, temperature=0.1, symmetric=symmetric, path=path)
    )
    assert_substantial(wanted)
    assert_close({**got, "d_doc": got["d_doc"][place_N]}, wanted, 1e-12)


@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("path", Path)
def test_hidden_from_all_equals_removed(path: Path, symmetric: bool) -> None:
    query_MD, doc_ND, _ = make_case((7, 11, 6))
    target_M = torch.tensor([0, 1, 2, 3, 2, 9, 10])
    kept_N = torch.tensor([0, 1, 2, 3, 5, 7, 9, 10])  # 4, 6, 8 are hidden from every query
    key_N = torch.arange(100, 111)
    key_N[[4, 6, 8]] = 77
    hidden = Candidates(target_M=target_M, query_key_M=torch.full((7,), 77), doc_key_N=key_N)
    removed = Candidates(target_M=torch.searchsorted(kept_N, target_M))
    options: dict[str, Any] = {"temperature": 0.1, "symmetric": symmetric, "path": path}
    got = values(info_nce(query_MD, doc_ND, hidden, **options))
    wanted = values(info_nce(query_MD, doc_ND[kept_N], removed, **options))
    assert not got["d_doc"][[4, 6, 8]].any()
    assert_substantial(wanted)
    assert_close({**got, "d_doc": got["d_doc"][kept_N]}, wanted, 1e-12)
    everything = values(info_nce(query_MD, doc_ND, Candidates(target_M=target_M), **options))
    assert relative_error(everything["d_query"], wanted["d_query"]) > 1e-3


@pytest.mark.parametrize("path", Path)
def test_symmetric_is_the_mean_of_both_directions(path: Path) -> None:
    query_MD, doc_ND, _ = make_case((37, 37, 20))
    target_M = torch.randperm(37, generator=generator(4))
    forth = Candidates(target_M=target_M)
    back = Candidates(target_M=target_M.argsort())

    both = info_nce(query_MD, doc_ND, forth, temperature=0.1, symmetric=True, path=path)
    there = info_nce(query_MD, doc_ND, forth, temperature=0.1, path=path)
    here = info_nce(doc_ND, query_MD, back, temperature=0.1, path=path)
    got = {**values(both), "num_first": both.loss.new_zeros(())}
    wanted = {
        "loss": (there.loss + here.loss) / 2,
        "d_query": (there.d_query_MD + here.d_doc_ND) / 2,
        "d_doc": (there.d_doc_ND + here.d_query_MD) / 2,
        "d_temperature": (there.d_temperature + here.d_temperature) / 2,
        "num_first": both.loss.new_zeros(()),
    }
    assert_substantial(wanted)
    assert relative_error(there.loss, here.loss) > 1e-6, "the directions do not differ"
    assert_close(got, wanted, 1e-12)


@OPTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_runs_give_the_same_bits(
    dtype: torch.dtype, symmetric: bool, owner: str, keys: str
) -> None:
    case = make_case((129, 257, 65), owner, keys, dtype)
    workspace = workspace_for(5, 257, 4)
    first, second = (chunked(case, 0.05, symmetric, workspace) for _ in range(2))
    assert_substantial(first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("path", Path)
def test_a_lone_query_with_nothing_to_beat(path: Path, symmetric: bool) -> None:
    query_MD, doc_ND, _ = make_case((1, 5, 4), dtype=torch.float32)
    candidates = Candidates(
        target_M=torch.tensor([3]), query_key_M=torch.tensor([0]), doc_key_N=torch.zeros(5).long()
    )
    result = info_nce(
        query_MD, doc_ND, candidates, temperature=0.01, symmetric=symmetric, path=path
    )
    assert float(result.loss) == 0
    assert float(result.accuracy) == 1
    for gradient in (result.d_query_MD, result.d_doc_ND, result.d_temperature):
        assert not gradient.any()  # NaN would count as True


@pytest.mark.parametrize("path", Path)
def test_a_row_with_nothing_to_beat_adds_nothing(path: Path) -> None:
    query_MD, doc_ND, _ = make_case((2, 5, 4))
    candidates = Candidates(
        target_M=torch.tensor([0, 1]),
        query_key_M=torch.tensor([1, 0]),
        doc_key_N=torch.zeros(5).long(),
    )
    got = info_nce(query_MD, doc_ND, candidates, temperature=0.1, path=path)
    alone = info_nce(
        query_MD[:1], doc_ND, Candidates(target_M=torch.tensor([0])), temperature=0.1, path=path
    )
    assert not got.d_query_MD[1].any()
    assert float(alone.loss) > 0.1
    assert float(got.loss) == pytest.approx(float(alone.loss) / 2, rel=1e-13)
    assert relative_error(got.d_query_MD[:1], alone.d_query_MD / 2) <= 1e-12
    assert relative_error(got.d_doc_ND, alone.d_doc_ND / 2) <= 1e-12


@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "both ways"])
def test_two_queries_with_one_positive(symmetric: bool) -> None:
    query_MD, doc_ND, _ = make_case((4, 5, 4))
    case = (query_MD, doc_ND, Candidates(target_M=torch.tensor([2, 0, 2, 4])))
    got = chunked(case, 0.2, symmetric)
    assert float(got["loss"]) == pytest.approx(loss_by_loops(case, 0.2, symmetric)[0], rel=1e-13)
    assert_close(got, by_reference(case, 0.2, symmetric), 1e-12)
    other = (query_MD, doc_ND, Candidates(target_M=torch.tensor([2, 0, 1, 4])))
    assert relative_error(chunked(other, 0.2, symmetric)["d_doc"], got["d_doc"]) > 1e-2


@pytest.mark.parametrize("path", Path)
def test_a_tie_counts_as_first(path: Path) -> None:
    query_MD = torch.eye(2)
    doc_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    result = info_nce(
        query_MD, doc_ND, Candidates(target_M=torch.tensor([1, 0])), temperature=1.0, path=path
    )
    assert float(result.accuracy) == 0.5


# --- memory -----------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors that lived at once during the call, temporaries of torch included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    profiler: Any = found.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "no allocation was recorded"
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert held >= 0
    return peak


@OPTIONS
def test_chunked_stays_within_its_workspace(symmetric: bool, owner: str, keys: str) -> None:
    num_queries, num_docs, width, workspace = 4096, 4096, 16, 2**20
    case = make_case((num_queries, num_docs, width), owner, keys, torch.float32)
    gradients = 4 * (num_queries + num_docs) * width
    got = peak_bytes(lambda: chunked(case, 0.05, symmetric, workspace))
    assert gradients < got <= gradients + workspace
    assert got < num_queries * num_docs * 4 / 32


@OPTIONS
def test_16_bit_inputs_are_widened_tile_by_tile(
    monkeypatch: pytest.MonkeyPatch, symmetric: bool, owner: str, keys: str
) -> None:
    case = make_case((300, 700, 64), owner, keys, torch.bfloat16)
    widened = chunked((case[0].float(), case[1].float(), case[2]), 0.05, symmetric)
    monkeypatch.setattr(chunked_module, "_TILE_BYTES", 10_000)  # 39 documents
    assert_close(chunked(case, 0.05, symmetric), widened, 1e-5)
    gradients = 4 * 1000 * 64
    got = peak_bytes(lambda: chunked(case, 0.05, symmetric, 2**16))
    assert got < gradients + 2**16 + 2 * 10_000 + 300 * 64 * 4


@pytest.mark.parametrize("path", list(Path))
def test_gradients_can_be_written_into_one_buffer(path: Path) -> None:
    case = make_case((37, 53, 40), "own", "keys", torch.float32)
    wanted = info_nce(*case, temperature=0.05, path=path)
    whole = torch.full((37 + 53, 40), torch.nan)
    out = (whole[:37], whole[37:])
    got = info_nce(*case, temperature=0.05, path=path, out=out)
    assert got.d_query_MD.data_ptr() == whole.data_ptr()
    assert torch.equal(whole, torch.cat([wanted.d_query_MD, wanted.d_doc_ND]))
    with pytest.raises(ValueError, match=r"out: got torch.float16 \(37, 40\)"):
        info_nce(*case, temperature=0.05, path=path, out=(whole[:37].half(), out[1]))


def test_the_measure_sees_a_whole_matrix() -> None:
    case = make_case((1024, 1024, 16), dtype=torch.float32)
    assert peak_bytes(lambda: chunked(case, 0.05, False, 2**30)) > 1024 * 1024 * 4


# --- errors -----------------------------------------------------------------------------------

QUERY, DOC, TARGET = torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "queries of one dimension": (
        {"query_MD": torch.ones(4)},
        r"got queries \(4,\) and documents \(3, 4\), wanted \(M, D\) and \(N, D\)",
    ),
    "documents of three dimensions": (
        {"doc_ND": torch.ones(1, 3, 4)},
        r"got queries \(2, 4\) and documents \(1, 3, 4\), wanted",
    ),
    "other widths": (
        {"doc_ND": torch.ones(3, 5)},
        r"got queries \(2, 4\) and documents \(3, 5\), wanted .* one D",
    ),
    "two dtypes": (
        {"doc_ND": DOC.double()},
        r"got torch.float32 queries and torch.float64 documents, wanted one floating dtype",
    ),
    "integers": (
        {"query_MD": QUERY.long(), "doc_ND": DOC.long()},
        r"got torch.int64 queries and torch.int64 documents, wanted one floating dtype",
    ),
    "no queries": (
        {"query_MD": QUERY[:0], "target_M": TARGET[:0]},
        r"got no queries or no documents, wanted at least one",
    ),
    "no documents": ({"doc_ND": DOC[:0]}, r"got no queries or no documents, wanted at least one"),
    **{
        f"temperature {value}": (
            {"temperature": value},
            rf"temperature: got {value}, wanted a finite number above 0",
        )
        for value in (0.0, -0.1, math.nan, math.inf)
    },
    "short target": (
        {"target_M": TARGET[:1]},
        r"target_M: got torch.int64 \(1,\), wanted int64 \(2,\)",
    ),
    "target of int32": (
        {"target_M": TARGET.int()},
        r"target_M: got torch.int32 \(2,\), wanted int64 \(2,\)",
    ),
    "target past the end": (
        {"target_M": torch.tensor([0, 3])},
        r"target_M: got entries in 0\.\.3, wanted 0\.\.2",
    ),
    "negative target": (
        {"target_M": torch.tensor([-1, 1])},
        r"target_M: got entries in -1\.\.1, wanted 0\.\.2",
    ),
    "long owner": (
        {"owner_N": torch.zeros(4).long()},
        r"owner_N: got torch.int64 \(4,\), wanted int64 \(3,\)",
    ),
    "owner of floats": (
        {"owner_N": torch.zeros(3)},
        r"owner_N: got torch.float32 \(3,\), wanted int64 \(3,\)",
    ),
    "keys of other lengths": (
        {"query_key_M": torch.zeros(3).long(), "doc_key_N": torch.zeros(3).long()},
        r"query_key_M: got torch.int64 \(3,\), wanted int64 \(2,\)",
    ),
    "document keys of two dimensions": (
        {"query_key_M": torch.zeros(2).long(), "doc_key_N": torch.zeros(3, 1).long()},
        r"doc_key_N: got torch.int64 \(3, 1\), wanted int64 \(3,\)",
    ),
    "query keys alone": (
        {"query_key_M": torch.zeros(2).long()},
        r"query_key_M and doc_key_N go together: got one of them",
    ),
    "document keys alone": (
        {"doc_key_N": torch.zeros(3).long()},
        r"query_key_M and doc_key_N go together: got one of them",
    ),
}


def call_with(query_MD: Tensor = QUERY, doc_ND: Tensor = DOC, **options: Any) -> InfoNCEResult:
    temperature, path = options.pop("temperature", 0.1), options.pop("path")
    candidates = Candidates(**{"target_M": TARGET, **options})
    return info_nce(query_MD, doc_ND, candidates, temperature=temperature, path=path)


@pytest.mark.parametrize("path", Path)
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_got_and_wanted(wrong: str, path: Path) -> None:
    assert torch.isfinite(call_with(path=path).loss)
    options, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call_with(**options, path=path)
