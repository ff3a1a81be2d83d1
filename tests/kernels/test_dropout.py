"""Every path of identity dropout gives the bits of its specification."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_cft_kernels import dropout as kernels
from lowmem_cft_kernels.dropout import (
    BLOCK_ELEMENTS,
    SERIAL_ELEMENTS,
    identity_dropout,
    keep_mask,
    keep_threshold,
    reference_dropout,
)

SHAPES = [(1, 1), (37, 53), (129, 257), (512, 576), (3, BLOCK_ELEMENTS + 5)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Case = tuple[Tensor, Tensor, Tensor]


def make_case(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Case:
    """x_LF without zeros, key_L, key_F."""
    draw = torch.Generator().manual_seed(sum(shape))

    def keys(count: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (count,), generator=draw, dtype=torch.int32)

    x_LF = torch.randn(shape, generator=draw, dtype=torch.float64)
    return (x_LF + x_LF.sign()).to(dtype), keys(shape[0]), keys(shape[1])


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    bits = BITS[got.element_size()]
    assert torch.equal(got.view(bits), wanted.view(bits))


def assert_is_dropout(out_LF: Tensor, x_LF: Tensor, rate: float) -> None:
    """Neither all nor none is kept, in every part; what is kept is scaled."""
    kept_LF = out_LF != 0
    sigma = (rate * (1 - rate) / kept_LF.numel()) ** 0.5
    assert abs(float(kept_LF.double().mean()) - (1 - rate)) <= 5 * sigma
    assert kept_LF.numel() < 1000 or 0 < int(kept_LF[-1].sum()) < kept_LF.shape[1]
    wanted = x_LF[kept_LF].double() / (1 - rate)
    epsilon = torch.finfo(x_LF.dtype).eps
    assert bool(((out_LF[kept_LF].double() - wanted).abs() <= 2 * epsilon * wanted.abs()).all())


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_equals_the_specification(shape: tuple[int, int], dtype: torch.dtype, rate: float) -> None:
    x_LF, key_L, key_F = make_case(shape, dtype)
    before = x_LF.clone()
    got = identity_dropout(x_LF, key_L, key_F, rate)
    assert_same_bits(got, reference_dropout(x_LF, key_L, key_F, rate))
    assert torch.equal(got != 0, keep_mask(key_L, key_F, rate))
    assert torch.equal(x_LF, before), "the input was written to"
    if got.numel() > 1:
        assert_is_dropout(got, x_LF, rate)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_blocks_and_threads_change_nothing(
    rows: int, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_LF, key_L, key_F = make_case((129, 257), dtype)
    for name in ("BLOCK_ELEMENTS", "SERIAL_ELEMENTS"):
        monkeypatch.setattr(kernels, name, rows * 257)
    torch.set_num_threads(threads)
    got = identity_dropout(x_LF, key_L, key_F, 0.3)
    assert_same_bits(got, reference_dropout(x_LF, key_L, key_F, 0.3))
    assert_is_dropout(got, x_LF, 0.3)


def words_of(key_L: Tensor, key_F: Tensor) -> Tensor:
    """int64 (L, F): the hash as unsigned words, in arithmetic that never overflows."""
    word = (key_L.long()[:, None] ^ key_F.long()) & 0xFFFFFFFF
    word ^= word >> 16
    word = _times(word, 0x7FEB352D)
    word ^= word >> 15
    word = _times(word, 0x846CA68B)
    word ^= word >> 16
    return word ^ 0x80000000  # the order of int32


def _times(word: Tensor, factor: int) -> Tensor:
    high = (word * (factor >> 16) & 0xFFFF) << 16
    return high + word * (factor & 0xFFFF) & 0xFFFFFFFF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_bit_of_the_word_counts(dtype: torch.dtype) -> None:
    """At a rate of exactly its word an element is kept, one step of 2^-32 above it is not."""
    x_LF, key_L, key_F = make_case((20, 10), dtype)
    words = words_of(key_L, key_F)
    assert len(words.unique()) == 200
    for i, j in ((i, j) for i in range(20) for j in range(10)):
        word = int(words[i, j])
        at, above = (
            identity_dropout(x_LF, key_L, key_F, share / 2**32) for share in (word, word + 1)
        )
        assert torch.equal(at != 0, words >= word)
        assert torch.equal(above != 0, words > word)
        assert bool(at[i, j] != 0)
        assert bool(above[i, j] == 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rate_at_its_edges(dtype: torch.dtype) -> None:
    x_LF, key_L, key_F = make_case((37, 53), dtype)
    assert identity_dropout(x_LF, key_L, key_F, 0) is x_LF
    assert bool(keep_mask(key_L, key_F, 0).all())
    assert keep_threshold(0) == keep_threshold(2**-34) == -(2**31)
    assert keep_threshold(1 - 2**-40) == 2**31 - 1, "the threshold has to stay an int32"
    for rate in (2**-34, 2**-32, 1 - 2**-32, 1 - 2**-40):
        got = identity_dropout(x_LF, key_L, key_F, rate)
        assert_same_bits(got, reference_dropout(x_LF, key_L, key_F, rate))
        assert bool((got != 0).all()) == (rate < 0.5)


def test_dropped_is_zero_whatever_it_was() -> None:
    _, key_L, key_F = make_case((37, 53))
    kept_LF = keep_mask(key_L, key_F, 0.5)
    for value in (torch.nan, torch.inf, -torch.inf, -1.0):
        got = identity_dropout(torch.full((37, 53), value), key_L, key_F, 0.5)
        assert bool((got[~kept_LF].view(torch.int32) == 0).all()), "wanted +0"
        assert torch.equal(got[kept_LF].isfinite(), torch.full_like(got[kept_LF], value).isfinite())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_strides_and_no_elements(dtype: torch.dtype) -> None:
    x_LF, key_L, key_F = make_case((37, 53), dtype)
    wanted = reference_dropout(x_LF, key_L, key_F, 0.3)
    strided = torch.stack([x_LF, x_LF + 1], dim=-1)[..., 0]
    for other in (x_LF.T.contiguous().T, strided):
        assert not other.is_contiguous()
        got = identity_dropout(other, key_L, key_F, 0.3)
        assert got.is_contiguous()
        assert_same_bits(got, wanted)
    ones = x_LF.new_ones(1).expand(37, 53)  # the gradient of a sum
    assert_same_bits(
        identity_dropout(ones, key_L, key_F, 0.3),
        reference_dropout(ones.contiguous(), key_L, key_F, 0.3),
    )
    assert identity_dropout(x_LF[:0], key_L[:0], key_F, 0.3).shape == (0, 53)
    assert identity_dropout(x_LF[:, :0], key_L, key_F[:0], 0.3).shape == (37, 0)


def amid_others(key: Tensor) -> dict[str, Tensor]:
    """The key as a column of a matrix, as a slice that begins within, and its first one expanded."""
    column = torch.stack([~key, key, ~key], dim=1)[:, 1]
    slice_ = torch.cat([~key, key, ~key])[len(key) : 2 * len(key)]
    return {"column": column, "slice": slice_, "expanded": slice_[:1].expand_as(key)}


def viewed_keys(x_LF: Tensor, key_L: Tensor, key_F: Tensor) -> list[Case]:
    """Each of the keys as each view, beside the other one as it is."""
    return [(x_LF, view, key_F) for view in amid_others(key_L).values()] + [
        (x_LF, key_L, view) for view in amid_others(key_F).values()
    ]


def test_keys_of_any_strides() -> None:
    for x_LF, key_L, key_F in viewed_keys(*make_case((37, 53))):
        wanted = reference_dropout(x_LF, key_L.clone(), key_F.clone(), 0.3)
        assert_same_bits(reference_dropout(x_LF, key_L, key_F, 0.3), wanted)
        assert_same_bits(identity_dropout(x_LF, key_L, key_F, 0.3), wanted)


class _Largest(TorchDispatchMode):
    """The greatest number of elements among results that are neither float nor views of floats."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_floating_point() and func not in _VIEWS:
            self.elements = max(self.elements, out.numel())
        return out


_VIEWS = (torch.ops.aten.view.dtype, torch.ops.aten.detach.default)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("threads", "bound"), [(1, BLOCK_ELEMENTS), (3, SERIAL_ELEMENTS), (4, 4 * BLOCK_ELEMENTS)]
)
def test_words_are_made_block_by_block(threads: int, bound: int, dtype: torch.dtype) -> None:
    x_LF, key_L, key_F = make_case((4096, 257), dtype)
    assert x_LF.numel() > 2 * bound
    torch.set_num_threads(threads)
    with _Largest() as blocked:
        got = identity_dropout(x_LF, key_L, key_F, 0.3)
    with _Largest() as whole:
        wanted = reference_dropout(x_LF, key_L, key_F, 0.3)
    assert_same_bits(got, wanted)
    assert bound / 2 < blocked.elements <= 2 * bound  # the scratch is two blocks
    assert whole.elements == x_LF.numel(), "the measure finds nothing"


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0, float("nan")])
def test_rate_out_of_range(rate: float) -> None:
    x_LF, key_L, key_F = make_case((2, 3))
    for function in (
        lambda: identity_dropout(x_LF, key_L, key_F, rate),
        lambda: keep_mask(key_L, key_F, rate),
    ):
        with pytest.raises(ValueError, match=rf"dropout rate: got {rate}, wanted at least 0 and"):
            function()


def test_arguments_that_do_not_fit() -> None:
    x_LF, key_L, key_F = make_case((2, 3))
    wrong = {
        r"x_LF: got torch.int32 \(2, 3\), wanted two dimensions of one of torch.float32": (
            (x_LF.int(), key_L, key_F)
        ),
        r"x_LF: got torch.float32 \(1, 2, 3\), .*flatten \(B, T, F\)": (x_LF[None], key_L, key_F),
        r"key_L: got torch.int64 \(2,\), wanted a vector of torch.int32": (
            (x_LF, key_L.long(), key_F)
        ),
        r"key_F: got torch.int32 \(3, 1\), wanted a vector": (x_LF, key_L, key_F[:, None]),
        r"keys: got 3 of tokens and 2 of features, wanted 2 and 3 for x_LF \(2, 3\)": (
            (x_LF, key_F, key_L)
        ),
        r"keys: got them on cpu and meta, wanted both where x_LF is, on cpu": (
            (x_LF, key_L, key_F.to("meta"))
        ),
        r"x_LF: got a tensor that requires a gradient.*torch.no_grad\(\)": (
            (x_LF.clone().requires_grad_(), key_L, key_F)
        ),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            identity_dropout(*arguments, 0.3)
    with pytest.raises(ValueError, match=r"key_L: got torch.int64"):
        keep_mask(key_L.long(), key_F, 0.3)
    with torch.no_grad():
        identity_dropout(x_LF.clone().requires_grad_(), key_L, key_F, 0.3)


# --- the Triton kernel, in triton's interpreter -----------------------------------------------

CHILD = """
import sys
import torch
from triton.runtime.interpreter import InterpretedFunction
from lowmem_cft_kernels import triton_dropout as kernels
from lowmem_cft_kernels.dropout import keep_threshold

assert isinstance(kernels.dropout_kernel, InterpretedFunction)
BLOCKS = {"BLOCK_L": kernels.BLOCK_L, "BLOCK_F": kernels.BLOCK_F}

def wide(x, key_l, key_f, threshold, scale):
    out = torch.empty_like(x)
    grid = (-(-x.shape[0] // kernels.BLOCK_L), -(-x.shape[1] // kernels.BLOCK_F))
    kernels.dropout_kernel[grid](
        x, key_l, key_f, out, *x.shape, threshold, scale, WIDE=True, **BLOCKS
    )
    return out

outs = []
for x, key_l, key_f, rate in torch.load(sys.argv[1]):
    arguments = x, key_l, key_f, keep_threshold(rate), 1 / (1 - rate)
    outs.append((kernels.launch_dropout(*arguments), wide(*arguments)))
torch.save(outs, sys.argv[2])
"""


def test_triton_equals_the_specification(tmp_path: Path) -> None:
    """bfloat16 is left out: the interpreter cuts it off where a GPU rounds."""
    cases = [
        (*make_case(shape, dtype), rate)
        for shape in ((1, 1), (37, 53), (129, 257), (512, 576))
        for dtype in (torch.float32, torch.float16)
        for rate in (2**-34, 0.1, 0.5, 1 - 2**-40)
    ]
    cases.append((cases[-1][0].T.contiguous().T, *cases[-1][1:3], 0.3))
    cases += [(*case, 0.3) for case in viewed_keys(*make_case((37, 53)))]
    given, made = tmp_path / "given.pt", tmp_path / "made.pt"
    torch.save(cases, given)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(given), str(made)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(made)
    assert len(results) == len(cases) == 39
    for (x_LF, key_L, key_F, rate), (got, wide) in zip(cases, results, strict=True):
        wanted = reference_dropout(x_LF, key_L.clone(), key_F.clone(), rate)
        assert_same_bits(got, wanted)
        if x_LF.is_contiguous() and key_L.is_contiguous() and key_F.is_contiguous():
            assert_same_bits(wide, wanted)
        differ = 0 not in (*key_L.stride(), *key_F.stride())
        if got.numel() > 1 and 0.1 <= rate <= 0.5 and differ:
            assert_is_dropout(got, x_LF, rate)
