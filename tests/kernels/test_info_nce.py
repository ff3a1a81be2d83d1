"""The chunked path against the formula: every option alone and every two together, in any dtype."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eager import eagerly
from loss_cases import (
    Case,
    Shape,
    assert_agrees,
    assert_same_bits,
    assert_substantial,
    drawn_set,
    errors,
    make_case,
    option_sets,
    singles,
)
from lowmem_cft_kernels import (
    Candidates,
    Hardness,
    InfoNCEResult,
    LossOptions,
    LossPath,
    choose_path,
    info_nce,
)
from lowmem_cft_kernels.masks import NO_TARGET
from lowmem_cft_kernels.problem import make_problem

SETS = option_sets()
EVERY_SET = pytest.mark.parametrize("name", SETS)
ALONE = pytest.mark.parametrize("name", singles())
SHAPES: list[Shape] = [
    (1, 1, 4),
    (2, 3, 5),
    (53, 7, 8),
    (37, 53, 40),
    (129, 257, 65),
    (16, 24, 2304),
    (8, 12, 2560),
    (3, 1500, 33),
]
MIDDLE = (37, 53, 40)
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def by_reference(case: Case) -> InfoNCEResult:
    """In float64, of the inputs as they were rounded."""
    return case.to(torch.float64).run(LossPath.REFERENCE)


def chunked(case: Case, workspace_bytes: int = 1 << 25, **more: Any) -> InfoNCEResult:
    return case.run(LossPath.CHUNKED, workspace_bytes=workspace_bytes, **more)


# agreement


@EVERY_SET
def test_every_set_in_float64(name: str) -> None:
    for shape in ((7, 11, 6), (13, 5, 4)):
        case = make_case(SETS[name], shape)
        wanted = by_reference(case)
        assert_substantial(wanted)
        for workspace in (1, 2500, 1 << 25):  # a query at a time, some, all
            assert_agrees(case, chunked(case, workspace), wanted, 1e-10)


@pytest.mark.parametrize("seed", range(150))
def test_any_options_at_once(seed: int) -> None:
    for shape in ((7, 11, 6), (13, 5, 4)):
        case = make_case(drawn_set(seed), shape, seed=seed)
        assert_agrees(case, chunked(case, 2500), by_reference(case), 1e-10)


def test_of_any_options_at_once_few_leave_nothing_to_compare() -> None:
    losses = [float(chunked(make_case(drawn_set(seed), (7, 11, 6))).loss) for seed in range(150)]
    assert sum(loss > 0.01 for loss in losses) > 140
    assert len({round(loss, 9) for loss in losses}) > 130


@EVERY_SET
def test_every_set_in_float32(name: str) -> None:
    case = make_case(SETS[name], MIDDLE, torch.float32)
    wanted = by_reference(case)
    assert_substantial(wanted)
    assert_agrees(case, chunked(case, 20_000), wanted, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALONE
def test_shapes(name: str, shape: Shape, dtype: torch.dtype, bound: float) -> None:
    case = make_case(SETS[name], shape, dtype)
    got, wanted = chunked(case, 100_000), by_reference(case)
    assert_agrees(case, got, wanted, bound)
    if shape[0] > 2:
        assert_substantial(wanted)
    for field in ("loss", "d_query_MD", "d_doc_ND", "d_temperature"):
        value = getattr(got, field)
        assert value.dtype == dtype
        assert value.shape == getattr(wanted, field).shape
        assert not value.requires_grad


@EVERY_SET
def test_16_bit_inputs_are_worked_on_in_float32(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        case = make_case(SETS[name], MIDDLE, dtype)
        got = chunked(case)
        assert got.d_query_MD.dtype == got.loss.dtype == torch.float32
        assert_agrees(case, got, by_reference(case), 1e-5)


@EVERY_SET
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_inputs_lose_at_most_twice_what_eager_loses(dtype: torch.dtype, name: str) -> None:
    case = make_case(SETS[name], MIDDLE, dtype)
    wanted, got = by_reference(case), chunked(case)
    rounded = dataclasses.replace(
        got, d_query_MD=got.d_query_MD.to(dtype), d_doc_ND=got.d_doc_ND.to(dtype)
    )
    ours = errors(case, rounded, wanted)
    for field, lost in errors(case, eagerly(case), wanted).items():
        assert lost > 0, "eager is exact: nothing was compared"
        assert ours[field] <= 2 * lost, field


# numbers at the edge


@pytest.mark.parametrize("scale", [1, 4], ids=["norm 1", "norm 4"])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "fp64"])
@ALONE
def test_low_temperature(name: str, dtype: str, scale: int) -> None:
    case = make_case(SETS[name], MIDDLE, DTYPES[dtype]).having(temperature=0.005)
    case = dataclasses.replace(  # by a power of two: exact
        case, query_MD=case.query_MD * scale, doc_ND=case.doc_ND * scale
    )
    wanted = by_reference(case)
    assert torch.isfinite(wanted.loss)
    # a logit of up to 200 * 1.3^2 * scale^2 is off by a few units in its last place
    assert_agrees(case, chunked(case, 50_000), wanted, 16 * 2**-24 * 1.7 * scale**2 / 0.005)


@ALONE
def test_similarities_may_exceed_what_float16_holds(name: str) -> None:
    case = make_case(SETS[name], MIDDLE, torch.float16)
    case = dataclasses.replace(case, query_MD=case.query_MD * 512, doc_ND=case.doc_ND * 512)
    larger = 1 if case.options["normalize"] else 2**18
    case = case.having(temperature=case.temperature * larger)
    if (hardness := case.options["hardness"]) is not None:
        case = case.having(hardness=Hardness(strength=hardness.strength / larger, on=hardness.on))
    assert bool((case.query_MD @ case.doc_ND.T).isinf().any())
    wanted = by_reference(case)
    assert torch.isfinite(wanted.loss)
    assert_agrees(case, chunked(case), wanted, 1e-5)


def assert_all_zero(result: InfoNCEResult) -> None:
    for field in ("loss", "d_query_MD", "d_doc_ND", "d_temperature"):
        assert not getattr(result, field).any(), field  # NaN would count as True


BOTH_PATHS = pytest.mark.parametrize("path", [LossPath.REFERENCE, LossPath.CHUNKED])


@BOTH_PATHS
@ALONE
def test_no_query_counts(name: str, path: LossPath) -> None:
    case = make_case(SETS[name], (7, 11, 6), torch.float32)
    assert float(case.run(path).loss) > 0.1
    no_weight = case.having(weight_M=torch.zeros(7)).run(path)
    target = torch.full_like(case.candidates.target, NO_TARGET)
    no_target = dataclasses.replace(
        case, candidates=dataclasses.replace(case.candidates, target=target)
    ).run(path)
    for result in (no_weight, no_target):
        assert_all_zero(result)
        assert all(value.isnan() for value in vars(result.observed).values())


@BOTH_PATHS
@ALONE
def test_all_negatives_are_hidden(name: str, path: LossPath) -> None:
    case = make_case(SETS[name] - {"one key", "two keys"}, (7, 11, 6), torch.float32)
    if case.options["bank"] is not None:
        bank = dataclasses.replace(case.options["bank"], keys_C=torch.zeros(7).long())
        case = case.having(bank=bank)
    candidates = dataclasses.replace(
        case.candidates, query_keys=torch.zeros(7).long(), doc_keys=torch.zeros(11).long()
    )
    result = dataclasses.replace(case, candidates=candidates).run(path)
    # a document always sees all queries that it is a positive of, and GTE sees the positive twice
    if not SETS[name] & {"several positives", "symmetric", "queries only", "gte"}:
        assert_near_zero(result)
    assert torch.isfinite(result.d_query_MD).all()
    assert float(result.observed.accuracy) == 1
    assert float(result.observed.masked_share) == 1
    assert result.observed.mean_negative.isnan()


def assert_near_zero(result: InfoNCEResult) -> None:
    """A probability of 1, less 1."""
    for field in ("loss", "d_query_MD", "d_doc_ND", "d_temperature"):
        assert float(getattr(result, field).abs().max()) < 1e-4, field


@BOTH_PATHS
def test_a_row_with_nothing_to_beat_adds_nothing(path: LossPath) -> None:
    case = make_case(frozenset(), (2, 5, 4))
    both = Candidates(
        target=torch.tensor([0, 1]),
        query_keys=torch.tensor([0, 1]),
        doc_keys=torch.zeros(5).long(),
    )
    got = info_nce(case.query_MD, case.doc_ND, both, temperature=0.1, path=path)
    second = Candidates(target=torch.tensor([1]))
    alone = info_nce(case.query_MD[1:], case.doc_ND, second, temperature=0.1, path=path)
    assert float(got.d_query_MD[0].abs().max()) < 1e-14
    assert float(alone.loss) > 0.1
    assert float(got.loss) == pytest.approx(float(alone.loss) / 2, rel=1e-13)
    assert torch.allclose(got.d_query_MD[1:], alone.d_query_MD / 2, rtol=1e-12, atol=1e-14)
    assert torch.allclose(got.d_doc_ND, alone.d_doc_ND / 2, rtol=1e-12, atol=1e-14)


@BOTH_PATHS
def test_a_vector_of_zeros_can_be_normalized(path: LossPath) -> None:
    case = make_case(frozenset({"normalize"}), (7, 11, 6), torch.float32)
    case.query_MD[0] = 0.0
    case.doc_ND[4] = 0.0
    result = case.run(path)
    for field in ("loss", "d_query_MD", "d_doc_ND", "d_temperature"):
        assert torch.isfinite(getattr(result, field)).all(), field


# the same bits


class _Poisoned(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """New memory holds NaN: what is read before it is written shows."""

    NAMES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.NAMES and result.is_floating_point():
            self.count += 1
            result.fill_(torch.nan)
        return result


@EVERY_SET
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_runs_give_the_same_bits_whatever_memory_held(dtype: str, name: str) -> None:
    case = make_case(SETS[name], MIDDLE, DTYPES[dtype])
    first = chunked(case, 20_000)
    assert_substantial(first)
    with _Poisoned() as poison:
        second = chunked(case, 20_000)
    assert poison.count > 2  # the gradients' at least
    assert_same_bits(second, first)


def test_the_poison_works() -> None:
    like, makers = torch.ones(2), list[Callable[[], Tensor]]()
    makers += [lambda: torch.empty(2), lambda: torch.empty_like(like), lambda: like.new_empty(2)]
    makers += [lambda: torch.empty_strided((2,), (1,)), lambda: like.new_empty(2)]
    for make in makers:
        with _Poisoned():
            assert make().isnan().all()


# the call


@BOTH_PATHS
@ALONE
def test_gradients_can_be_written_into_one_buffer(name: str, path: LossPath) -> None:
    case = make_case(SETS[name], MIDDLE, torch.float32)
    whole = torch.full((37 + 53, 40), torch.nan)
    got = case.run(path, out=(whole[:37], whole[37:]))
    assert got.d_query_MD.data_ptr() == whole.data_ptr()
    assert_same_bits(got, case.run(path))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_need_not_be_contiguous(dtype: str) -> None:
    case = make_case(SETS["a dozen, gte"], (7, 11, 6), DTYPES[dtype])
    strided = dataclasses.replace(
        case, query_MD=case.query_MD.T.contiguous().T, doc_ND=case.doc_ND.repeat(1, 2)[:, :6]
    )
    assert not strided.doc_ND.is_contiguous()
    got = chunked(strided)
    assert got.d_query_MD.is_contiguous()
    assert_agrees(case, got, chunked(case), 1e-5)


@BOTH_PATHS
def test_result_of_the_public_call(path: LossPath) -> None:
    case = make_case(SETS["own negatives + two keys"], (7, 11, 6), torch.bfloat16)
    case.query_MD.requires_grad_()
    result = case.run(path)
    assert result.path is path
    values = [getattr(result, f.name) for f in dataclasses.fields(result)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    tensors += vars(result.observed).values()
    assert len(tensors) == 9
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in tensors)
    assert case.query_MD.grad is None


@BOTH_PATHS
def test_a_temperature_of_any_scalar_shape_and_dtype(path: LossPath) -> None:
    case = make_case(SETS["a dozen, symmetric"], (7, 11, 6))
    wanted = case.having(temperature=0.125).run(path)
    for dtype in DTYPES.values():
        for shape in ((), (1,), (1, 1)):
            got = case.having(temperature=torch.full(shape, 0.125, dtype=dtype)).run(path)
            assert got.loss.shape == got.d_temperature.shape == ()
            assert_same_bits(got, wanted)


def test_inputs_are_left_as_they_are() -> None:
    for name in singles():
        case = make_case(SETS[name], (7, 11, 6), torch.float32)
        before = [tensor.clone() for tensor in case.tensors()]
        chunked(case)
        assert all(torch.equal(*pair) for pair in zip(before, case.tensors(), strict=True)), name


def test_the_path_chosen_without_a_gpu() -> None:
    case = make_case(frozenset(), (7, 11, 6))
    assert case.run().path is choose_path(case.query_MD, case.doc_ND) is LossPath.CHUNKED


def test_cases_can_be_handed_to_another_process(tmp_path: pathlib.Path) -> None:
    cases = {name: make_case(SETS[name], (7, 11, 6), torch.bfloat16) for name in singles()}
    torch.save(cases, tmp_path / "cases.pt")
    for name, case in torch.load(tmp_path / "cases.pt", weights_only=False).items():
        assert_same_bits(chunked(case), chunked(cases[name]))


@EVERY_SET
def test_weights_of_pairs_sum_to_one(name: str) -> None:
    case = make_case(SETS[name], (7, 11, 6))
    problem = make_problem(case.query_MD, case.doc_ND, case.candidates, LossOptions(**case.options))
    assert float(problem.weight_MP.sum()) == pytest.approx(1, rel=1e-12)
    assert not problem.weight_MP[~problem.there_MP].any()
