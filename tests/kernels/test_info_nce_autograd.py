"""The loss as a function that autograd differentiates, and the temperature that is learned by it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loss_cases import Case, make_case, option_sets, singles
from lowmem_cft_kernels import LearnedTemperature, LossPath, info_nce_loss
from numerics import relative_error

SETS = option_sets()
ALONE = pytest.mark.parametrize("name", singles())
PATHS = pytest.mark.parametrize("path", [LossPath.REFERENCE, LossPath.CHUNKED])


def differentiable(case: Case, path: LossPath, **more: Any) -> Tensor:
    options = {**case.options, **more}
    return info_nce_loss(case.query_MD, case.doc_ND, case.candidates, **options, path=path)


def with_leaves(case: Case) -> tuple[Case, list[Tensor]]:
    temperature = torch.tensor(case.temperature, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (case.query_MD, case.doc_ND, temperature)]
    moved = replace(case.having(temperature=leaves[2]), query_MD=leaves[0], doc_ND=leaves[1])
    return moved, leaves


@PATHS
@ALONE
def test_equals_value_and_gradients(name: str, path: LossPath) -> None:
    case = make_case(SETS[name], (7, 11, 6))
    wanted = case.run(path)
    assert torch.equal(differentiable(case, path), wanted.loss)
    moved, leaves = with_leaves(case)
    loss = differentiable(moved, path)
    assert torch.equal(loss.detach(), wanted.loss)
    (3 * loss).backward()
    gradients = (wanted.d_query_MD, wanted.d_doc_ND, wanted.d_temperature)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient * 3)


@PATHS
@pytest.mark.parametrize("asked", [{0}, {1}, {2}, {0, 1}, {1, 2}], ids=str)
def test_only_what_asks_gets_a_gradient(asked: set[int], path: LossPath) -> None:
    case, leaves = with_leaves(make_case(SETS["a dozen, gte"], (7, 11, 6)))
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in asked)
    differentiable(case, path).backward()
    assert {index for index, leaf in enumerate(leaves) if leaf.grad is not None} == asked
    assert all(bool(leaves[index].grad.any()) for index in asked)  # type: ignore[union-attr]


@PATHS
def test_gradient_goes_on_through_what_made_the_inputs(path: LossPath) -> None:
    case, (query_MD, doc_ND, _) = with_leaves(make_case(SETS["symmetric"], (7, 11, 6)))
    mixer = torch.eye(6, dtype=torch.float64).mul_(0.9).add_(0.1).requires_grad_()
    mixed = replace(case, query_MD=query_MD @ mixer, doc_ND=doc_ND @ mixer)
    differentiable(mixed, path).backward()
    result = mixed.run(path)
    wanted = query_MD.detach().T @ result.d_query_MD + doc_ND.detach().T @ result.d_doc_ND
    assert mixer.grad is not None
    assert relative_error(mixer.grad, wanted) < 1e-12


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_the_dtype_of_their_inputs(dtype: torch.dtype, path: LossPath) -> None:
    case, leaves = with_leaves(make_case(SETS["a dozen, symmetric"], (7, 11, 6), dtype))
    loss = differentiable(case, path)
    assert loss.dtype == torch.float32
    loss.backward()
    assert [leaf.grad.dtype for leaf in leaves] == [dtype, dtype, torch.float64]  # type: ignore[union-attr]
    wanted = case.run(path)
    for leaf, gradient in zip(leaves, (wanted.d_query_MD, wanted.d_doc_ND), strict=False):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient.to(dtype))


@PATHS
def test_float16_gradients_of_a_scaled_loss(path: LossPath) -> None:
    """A scale beyond float16 times gradients below it: the product fits."""
    plain = make_case(SETS["plain"], (7, 11, 6), torch.float16)
    case, leaves = with_leaves(plain)
    small, scale = 2.0**-20, 2.0**20
    (differentiable(case, path) * small * scale).backward()
    wanted = case.run(path).d_query_MD
    assert leaves[0].grad is not None
    assert torch.equal(leaves[0].grad, wanted.half())
    leaves[0].grad = None
    (differentiable(case, path) * 2.0**17).backward()
    assert torch.equal(leaves[0].grad, (wanted * 2.0**17).half())


@PATHS
def test_double_backward_is_refused(path: LossPath) -> None:
    case, leaves = with_leaves(make_case(SETS["plain"], (7, 11, 6)))
    loss = differentiable(case, path)
    with pytest.raises(RuntimeError, match=r"got create_graph=True, has no second derivative"):
        torch.autograd.grad(loss, leaves[:1], create_graph=True)


def test_bad_arguments_are_refused_as_by_the_other_call() -> None:
    case = make_case(SETS["plain"], (7, 11, 6))
    with pytest.raises(ValueError, match=r"temperature: got 0\.0"):
        differentiable(case, LossPath.CHUNKED, temperature=0.0)


# the temperature


def test_a_temperature_starts_where_told_and_stays_within_bounds() -> None:
    for initial, low, high in ((0.05, 0.005, 1.0), (0.9, 0.1, 1.0), (0.011, 0.01, 100.0)):
        learned = LearnedTemperature(initial, low, high)
        assert float(learned().detach()) == pytest.approx(initial, rel=1e-5)
        assert [tuple(parameter.shape) for parameter in learned.parameters()] == [()]
        for raw in (-1e6, -5.0, 0.0, 5.0, 1e6):
            with torch.no_grad():
                learned.raw.fill_(raw)
            assert low * (1 - 1e-6) <= float(learned().detach()) <= high * (1 + 1e-6)


def test_gradient_of_a_learned_temperature() -> None:
    learned = LearnedTemperature(0.07).double()
    assert torch.autograd.gradcheck(lambda _: learned(), (learned.raw,))


@PATHS
@ALONE
def test_a_learned_temperature_gets_the_gradient_of_the_loss(name: str, path: LossPath) -> None:
    case = make_case(SETS[name], (7, 11, 6))
    # what hardness adds is a constant for the gradient: differences see another slope
    case = case.having(hardness=None)
    learned = LearnedTemperature(0.3, low=0.01).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        differentiable(case, path, temperature=learned()).backward()
    raw, step = float(learned.raw.detach()), 1e-5
    around = []
    for moved in (raw - step, raw + step):
        with torch.no_grad():
            learned.raw.fill_(moved)
            around.append(float(differentiable(case, path, temperature=learned())))
    wanted = (around[1] - around[0]) / (2 * step)
    assert abs(wanted) > 1e-3
    assert learned.raw.grad is not None
    assert float(learned.raw.grad) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@PATHS
@pytest.mark.parametrize("start", [0.006, 0.9])
def test_a_learned_temperature_finds_the_best_one(start: float, path: LossPath) -> None:
    """From near either bound, by gradients alone."""
    case = make_case(SETS["symmetric"], (37, 53, 8))
    grid = [0.005 * 1.05**k for k in range(1, 108)]
    losses = [float(case.having(temperature=temperature).run(path).loss) for temperature in grid]
    best = grid[losses.index(min(losses))]
    assert 0.02 < best < 0.8
    learned = LearnedTemperature(start)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        differentiable(case, path, temperature=learned()).backward()
        optimizer.step()
    assert math.log(float(learned().detach()) / best) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(
    ("initial", "low", "high"),
    [(0.5, 0.5, 1.0), (1.0, 0.5, 1.0), (0.1, 0.0, 1.0), (0.1, 0.01, math.inf), (0.1, 0.5, 1.0)],
)
def test_bounds_out_of_order(initial: float, low: float, high: float) -> None:
    message = rf"got low {low}, initial {initial}, high {high}, wanted 0 < low < initial < high"
    with pytest.raises(ValueError, match=message):
        LearnedTemperature(initial, low, high)
