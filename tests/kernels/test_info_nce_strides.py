"""Arguments are read where their strides say, on every path.

Each argument in turn is a view amid a larger buffer: a column of a wider matrix or every second
element, a slice that begins within, the transpose of what is contiguous, one element or row
expanded. What lies around it would change the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreted import Job, interpret
from loss_cases import (
    Case,
    Settings,
    assert_same_bits,
    assert_substantial,
    errors,
    make_case,
)
from lowmem_cft_kernels import InfoNCEResult, LossPath

SHAPE = (9, 14, 6)

SETTINGS: dict[str, Settings] = {
    "vectors": frozenset(
        {"own negatives", "one key", "margin per row", "weights", "bank", "symmetric"}
        | {"in-batch hardness", "tensor temperature"}
    ),
    "matrices": frozenset(
        {"own negatives", "two keys", "relative margin", "guides", "weights", "bank", "gte"}
        | {"several positives", "normalize"}
    ),
    "one pass": frozenset({"own negatives", "two keys", "several positives", "weights"}),
}


def around(x: Tensor, *shape: int) -> Tensor:
    """A buffer that says something else than `x` wherever it is read."""
    if x.is_floating_point():
        return x.new_full(shape, torch.nan)
    # owners, columns and keys are small numbers: each of these is one, and hides or chooses others
    return torch.arange(torch.Size(shape).numel()).view(shape) % 3


def strided(x: Tensor) -> Tensor:
    """A column of a wider matrix; every second element of every second row."""
    if x.ndim == 1:
        return around(x, len(x), 3)[:, 1].copy_(x)
    return around(x, 2 * len(x), 2 * x.shape[1])[1::2, 1::2].copy_(x)


def begun_within(x: Tensor) -> Tensor:
    """Off 16 bytes."""
    buffer = around(x, *(size + 4 for size in x.shape))
    return buffer[tuple(slice(3, 3 + size) for size in x.shape)].copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T if x.ndim == 2 else x


def expanded(x: Tensor) -> Tensor:
    """The first element, or row, over and over."""
    return begun_within(x)[:1].expand_as(x)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    view.__name__: view for view in (strided, begun_within, transposed, expanded)
}


def places(case: Case) -> dict[str, tuple[str, ...]]:
    """Every tensor of a case, and where it is."""
    places: dict[str, tuple[str, ...]] = {"query_MD": ("query_MD",), "doc_ND": ("doc_ND",)}
    holders = {"candidates": case.candidates, **case.options}
    for name, holder in holders.items():
        if isinstance(holder, Tensor):
            places[name] = (name,)
        elif dataclasses.is_dataclass(holder):
            tensors = (key for key, value in vars(holder).items() if isinstance(value, Tensor))
            places |= {f"{name}.{key}": (name, key) for key in tensors}
    return places


def with_view(case: Case, place: tuple[str, ...], view: Callable[[Tensor], Tensor]) -> Case:
    """With one tensor as such a view."""
    name, *rest = place
    own = name in ("query_MD", "doc_ND", "candidates")
    held = getattr(case, name) if own else case.options[name]
    if rest:
        changed: Any = dataclasses.replace(held, **{rest[0]: view(getattr(held, rest[0]))})
    else:
        changed = view(held)
    return dataclasses.replace(case, **{name: changed}) if own else case.having(**{name: changed})


def contiguous(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The values of the view, one after the other."""
    return lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(view(x))


def scalar_amid(x: Tensor) -> Tensor:
    return begun_within(x.view(1))[0]


def viewed_and_plain(settings: Settings) -> tuple[dict[str, Case], dict[str, Case]]:
    """Cases with one view each, by argument and kind; and those of the same values in a row."""
    case = make_case(settings, SHAPE, torch.float32)
    viewed, plain = {}, {"": case}
    for name, place in places(case).items():
        scalar = name == "temperature"
        for kind, view in {"scalar": scalar_amid}.items() if scalar else VIEWS.items():
            viewed[f"{name}, {kind}"] = with_view(case, place, view)
            if kind == "expanded":
                plain[f"{name}, {kind}"] = with_view(case, place, contiguous(view))
    return viewed, plain


def assert_views_are_read(
    settings: Settings, run: Callable[[list[Case]], list[InfoNCEResult]]
) -> None:
    """By this path: the bits of the contiguous, and the numbers of the formula."""
    viewed, plain = viewed_and_plain(settings)
    names = [*viewed, *(f"{name} in a row" for name in plain)]
    results = dict(zip(names, run([*viewed.values(), *plain.values()]), strict=True))
    failed = []
    for name, case in viewed.items():
        same = name if name in plain else ""
        wanted = results[f"{same} in a row"]
        got, exact = results[name], plain[same].to(torch.float64).run(LossPath.REFERENCE)
        try:
            for field, error in errors(case, got, exact).items():
                assert error <= 1e-5, f"{field} is off by {error:.1e}"
            assert_same_bits(got, wanted)
        except AssertionError as error:
            failed.append(f"{name}: {str(error).splitlines()[0]}")
    assert not failed, "\n".join(failed)


def test_every_argument_is_tried() -> None:
    tried: set[str] = set()
    for settings in SETTINGS.values():
        case = make_case(settings, SHAPE, torch.float32)
        assert len(places(case)) == len(case.tensors())
        assert_substantial(case.run(LossPath.REFERENCE))
        tried |= {f"{name} {len(x.shape)}" for name, x in tensors(case).items()}
    assert tried == {
        *("query_MD 2", "doc_ND 2", "candidates.target 1", "candidates.target 2"),
        *("candidates.owner_N 1", "candidates.query_keys 1", "candidates.query_keys 2"),
        *(
            "candidates.doc_keys 1",
            "candidates.positive_keys 1",
            "candidates.own_keys 1",
            "weight_M 1",
            "temperature 0",
            "false_negatives.margin 1",
        ),
        *("false_negatives.query_guide_MG 2", "false_negatives.doc_guide_NG 2"),
        *("bank.doc_CD 2", "bank.keys_C 1", "bank.guide_CG 2"),
    }


def tensors(case: Case) -> dict[str, Tensor]:
    tensors = {}
    for name, (first, *rest) in places(case).items():
        held = getattr(case, first) if hasattr(case, first) and first != "temperature" else None
        held = case.options[first] if held is None else held
        tensors[name] = getattr(held, rest[0]) if rest else held
    return tensors


@pytest.mark.parametrize("path", [LossPath.REFERENCE, LossPath.CHUNKED])
@pytest.mark.parametrize("name", SETTINGS)
def test_views_on_paths_of_plain_torch(name: str, path: LossPath) -> None:
    assert_views_are_read(SETTINGS[name], lambda cases: [case.run(path) for case in cases])


@pytest.mark.parametrize("name", SETTINGS)
def test_views_on_the_triton_path(name: str, tmp_path: Path) -> None:

    def run(cases: list[Case]) -> list[InfoNCEResult]:
        return [done.result for done in interpret(tmp_path, [Job(case) for case in cases])]

    assert_views_are_read(SETTINGS[name], run)


# what is written


def outs(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """Places for both gradients, by kind of view."""
    shapes = (case.query_MD.shape, case.doc_ND.shape)
    kinds = {kind: view for kind, view in VIEWS.items() if kind != "expanded"}
    return {
        kind: (view(torch.zeros(shapes[0])), view(torch.zeros(shapes[1])))
        for kind, view in kinds.items()
    }


def assert_written(case: Case, result: InfoNCEResult, kind: str) -> None:
    """The formula's numbers, and nothing around them."""
    exact = case.to(torch.float64).run(LossPath.REFERENCE)
    assert all(error <= 1e-5 for error in errors(case, result, exact).values())
    for gradient in (result.d_query_MD, result.d_doc_ND):
        assert not gradient.is_contiguous()
        numbers = torch.empty(0).set_(gradient.untyped_storage())
        around_it = numbers.numel() - gradient.numel()
        assert int(numbers.isnan().sum()) == around_it
        assert kind == "transposed" or around_it > gradient.shape[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_into_views(name: str, tmp_path: Path) -> None:
    case = make_case(SETTINGS[name], SHAPE, torch.float32)
    for path in (LossPath.REFERENCE, LossPath.CHUNKED):
        for kind, out in outs(case).items():
            result = case.run(path, out=out)
            assert result.d_query_MD is out[0]
            assert_written(case, result, kind)
    jobs = [Job(case, {"out": out}) for out in outs(case).values()]
    for kind, job_done in zip(outs(case), interpret(tmp_path, jobs), strict=True):
        assert_written(case, job_done.result, kind)
