"""A caller's autocast and his settings of float32 products; machines that Triton cannot start on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loss_cases import assert_same_bits, make_case, option_sets
from lowmem_cft_kernels import LossPath, chunked
from lowmem_cft_kernels.surroundings import full_precision, why_triton_cannot_start

SETS = option_sets()
CUDA: Any = torch.backends.cuda.matmul
CPU: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", [LossPath.REFERENCE, LossPath.CHUNKED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "a dozen, gte"])
def test_autocast_changes_no_bit(name: str, dtype: torch.dtype, path: LossPath) -> None:
    case = make_case(SETS[name], (17, 29, 24), dtype)
    wanted = case.run(path)
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        got = case.run(path)
    assert_same_bits(got, wanted)


def _old(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def _new_names() -> None:
    CUDA.fp32_precision = "tf32"
    CPU.fp32_precision = "bf16"


def _old_flag() -> None:
    CUDA.allow_tf32 = True


def _state() -> tuple[Any, ...]:
    """None where torch refuses to read, as what was set by the new names."""
    try:
        legacy = (torch.get_float32_matmul_precision(), CUDA.allow_tf32)
    except RuntimeError:
        legacy = None
    return legacy, CUDA.fp32_precision, CPU.fp32_precision


@pytest.fixture
def settings_back() -> Iterator[None]:
    kept = CUDA.fp32_precision, CPU.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision, CPU.fp32_precision = kept


@pytest.mark.usefixtures("settings_back")
@pytest.mark.parametrize(
    ("setting", "reduced"),
    [
        (_old("highest"), False),
        (_old("high"), True),
        (_old("medium"), True),
        (_old_flag, True),
        (_new_names, True),
    ],
    ids=["highest", "high", "medium", "allow_tf32", "fp32_precision"],
)
def test_float32_products_are_exact_meanwhile(
    setting: Callable[[], None], reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(self: chunked.Chunked) -> Any:
        seen.append((CUDA.fp32_precision, CPU.fp32_precision))
        return whole(self)

    whole = chunked.Chunked.run
    monkeypatch.setattr(chunked.Chunked, "run", run)
    case = make_case(SETS["plain"], (17, 29, 24), torch.float32)
    wanted = case.run(LossPath.CHUNKED)
    setting()
    before = _state()
    assert bool({"tf32", "bf16"} & set(before[1:])) is reduced
    assert_same_bits(case.run(LossPath.CHUNKED), wanted)
    assert not {"tf32", "bf16"} & set(seen[-1])
    assert _state() == before
    with pytest.raises(KeyError), full_precision("cpu"):
        raise KeyError
    assert _state() == before


@pytest.fixture
def probe() -> Iterator[Callable[[], str | None]]:
    why_triton_cannot_start.cache_clear()
    yield why_triton_cannot_start
    why_triton_cannot_start.cache_clear()


def test_without_a_compiler_triton_is_said_not_to_start(
    probe: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import driver

    class Broken:
        @property
        def utils(self) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(driver, "_active", Broken())
    assert probe() == "triton cannot start (Failed to find C compiler.)"
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=None))
    assert probe() is not None  # a process asks once
    why_triton_cannot_start.cache_clear()
    assert probe() is None
