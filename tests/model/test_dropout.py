"""Masks that depend on identity alone, and look random in every direction."""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowmem_cft.data.chunks import token_positions
from lowmem_cft.model.dropout import DropoutClock, IdentityDropout, _derive, _mix64

RATES = pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
NUM_TEXTS, NUM_POSITIONS, NUM_FEATURES = 64, 32, 512  # 2^20 elements
NUM_ELEMENTS = NUM_TEXTS * NUM_POSITIONS * NUM_FEATURES


def keep(
    rate: float,
    *,
    seed: int = 0,
    step: int = 0,
    name: str = "layers.0.q_proj",
    num_texts: int = NUM_TEXTS,
    num_positions: int = NUM_POSITIONS,
    num_features: int = NUM_FEATURES,
) -> Tensor:
    """bool (B, T, F): the mask of texts 0, 1, ... with no padding."""
    clock = DropoutClock(seed=seed, step=step)
    clock.set_chunk(torch.arange(num_texts), torch.arange(num_positions).repeat(num_texts, 1))
    mask_LF = IdentityDropout(rate, name, clock).keep_mask(num_features)
    return mask_LF.view(num_texts, num_positions, num_features)


def sigmas_of_share(mask: Tensor, share: float) -> float:
    """By how many standard deviations the share of True is off."""
    error = float(mask.double().mean()) - share
    return abs(error) * math.sqrt(mask.numel() / (share * (1 - share)))


def sigmas_of_correlation(first: Tensor, second: Tensor, share: float) -> float:
    """How far the correlation of two masks is from 0, where 1 / sqrt(n) is one sigma."""
    assert first.shape == second.shape
    product = (first.double() - share) * (second.double() - share) / (share * (1 - share))
    return abs(float(product.mean())) * math.sqrt(product.numel())


# --- randomness -------------------------------------------------------------------------------


@RATES
@pytest.mark.parametrize("seed", [0, 42, -1])
def test_share_kept(rate: float, seed: int) -> None:
    mask = keep(rate, seed=seed)
    assert mask.numel() == NUM_ELEMENTS >= 1e6
    assert sigmas_of_share(mask, 1 - rate) <= 5


@RATES
@pytest.mark.parametrize("along", [0, 1, 2], ids=["texts", "positions", "features"])
def test_no_text_position_or_feature_is_favoured(rate: float, along: int) -> None:
    mask = keep(rate)
    count = mask.shape[along]
    kept = mask.movedim(along, 0).reshape(count, -1).double().sum(dim=1)
    trials = mask.numel() / count
    chi2 = float(((kept - trials * (1 - rate)) ** 2).sum() / (trials * rate * (1 - rate)))
    assert abs(chi2 - count) <= 5 * (2 * count) ** 0.5


def both_triangles(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The elements at [i, j] and at [j, i] for i < j."""
    i, j = torch.triu_indices(len(mask), len(mask), 1)
    return mask[i, j], mask[j, i]


PAIRS: dict[str, Callable[[float], tuple[Tensor, Tensor]]] = {
    "neighbouring features": lambda p: (keep(p)[..., 1:], keep(p)[..., :-1]),
    "features 64 apart": lambda p: (keep(p)[..., 64:], keep(p)[..., :-64]),
    "neighbouring positions": lambda p: (keep(p)[:, 1:], keep(p)[:, :-1]),
    "neighbouring places": lambda p: (keep(p)[1:], keep(p)[:-1]),
    "steps": lambda p: (keep(p, step=0), keep(p, step=1)),
    "seeds": lambda p: (keep(p, seed=0), keep(p, seed=1)),
    "seed and step exchanged": lambda p: (keep(p, seed=3, step=4), keep(p, seed=4, step=3)),
    "modules": lambda p: (keep(p, name="layers.0.q_proj"), keep(p, name="layers.1.q_proj")),
    "place and position exchanged": lambda p: both_triangles(keep(p, num_texts=NUM_POSITIONS)),
    "position and feature exchanged": lambda p: both_triangles(
        keep(p, num_features=NUM_POSITIONS).movedim(0, -1)
    ),
}


@RATES
@pytest.mark.parametrize("pair", PAIRS)
def test_independent(pair: str, rate: float) -> None:
    first, second = PAIRS[pair](rate)
    assert first.numel() >= 30_000
    assert 0 < float(first.double().mean()) < 1
    assert sigmas_of_correlation(first, second, 1 - rate) <= 5
    assert sigmas_of_correlation(first, first, 1 - rate) > 5, "the measure finds nothing"


def test_neighbours_of_three_dimensions_are_independent_together() -> None:
    """Pairs alone would not show a linear generator, where one element is the xor of others."""
    sign = keep(0.5).double() * 2 - 1
    corner = sign[1:, 1:, 1:] * sign[:-1, 1:, 1:] * sign[1:, :-1, 1:] * sign[1:, 1:, :-1]
    face = sign[:, 1:, 1:] * sign[:, :-1, 1:] * sign[:, 1:, :-1] * sign[:, :-1, :-1]
    for product in (corner, face):
        assert abs(float(product.mean())) * product.numel() ** 0.5 <= 5


def test_token_keys_do_not_collide() -> None:
    keys = []
    for seed in range(4):
        for step in range(8):
            clock = DropoutClock(seed=seed, step=step)
            clock.set_chunk(torch.arange(64), torch.arange(64).repeat(64, 1))
            assert clock.token_key_L is not None
            assert clock.token_key_L.shape == (64 * 64,)
            keys.append(clock.token_key_L)
    everything = torch.cat(keys)
    assert len(set(everything.tolist())) == len(everything) == 4 * 8 * 64 * 64


# --- identity ---------------------------------------------------------------------------------

LENGTHS = torch.tensor([3, 9, 1, 7, 5, 9, 2, 4])


def masks_by_place(
    chunks: list[list[int]], side: str = "right", extra: int = 0, flat: bool = False
) -> dict[int, Tensor]:
    """(length, F) of each place: what dropout makes of ones in these chunks, padding cut off."""
    clock = DropoutClock(seed=7, step=3)
    dropout = IdentityDropout(0.5, "module", clock)
    masks: dict[int, Tensor] = {}
    for chunk in chunks:
        place_B = torch.tensor(chunk)
        width = int(LENGTHS[place_B].max()) + extra
        mask_BT = torch.arange(width) < LENGTHS[place_B, None]
        if side == "left":
            mask_BT = mask_BT.flip(1)
        clock.set_chunk(place_B, token_positions(mask_BT))
        ones = torch.ones(len(chunk), width, 24)
        out = dropout(ones.flatten(0, 1)).view_as(ones) if flat else dropout(ones)
        masks |= {place: out[i][mask_BT[i]] for i, place in enumerate(chunk)}
    return masks


CHUNKINGS = {
    "one text a chunk": [[i] for i in range(8)],
    "ragged": [[0, 1, 2], [3], [4, 5, 6, 7]],
    "other order": [[6, 2, 0], [7, 5, 1], [4, 3]],
    "reversed": [list(range(7, -1, -1))],
}


@pytest.mark.parametrize("flat", [False, True], ids=["BTF", "flat"])
@pytest.mark.parametrize("extra", [0, 6], ids=["tight", "wider"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_mask_depends_on_identity_alone(chunking: str, side: str, extra: int, flat: bool) -> None:
    wanted = masks_by_place([list(range(8))])
    got = masks_by_place(CHUNKINGS[chunking], side, extra, flat)
    assert got.keys() == wanted.keys() == set(range(8))
    for place, mask in wanted.items():
        assert mask.shape == (int(LENGTHS[place]), 24)
        assert torch.equal(got[place], mask)
    assert not torch.equal(wanted[1], wanted[5]), "two places of one length share a mask"


def test_mask_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    first = keep(0.3, num_texts=2)
    assert torch.equal(torch.rand(3), wanted)
    torch.manual_seed(1)
    assert torch.equal(keep(0.3, num_texts=2), first)


# --- the module -------------------------------------------------------------------------------


def ready(rate: float, num_texts: int = 2, num_positions: int = 3) -> IdentityDropout:
    clock = DropoutClock(seed=1, step=2)
    clock.set_chunk(torch.arange(num_texts), torch.arange(num_positions).repeat(num_texts, 1))
    return IdentityDropout(rate, "module", clock)


@RATES
def test_mean_is_unbiased_over_elements(rate: float) -> None:
    out = ready(rate, NUM_TEXTS, NUM_POSITIONS)(torch.ones(NUM_TEXTS, NUM_POSITIONS, NUM_FEATURES))
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - rate))}
    sigma = (rate / (1 - rate) / out.numel()) ** 0.5
    assert abs(float(out.double().mean()) - 1) <= 5 * sigma


@RATES
def test_mean_is_unbiased_over_steps(rate: float) -> None:
    dropout, num_steps = ready(rate), 4000
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros_like(x)
    for step in range(num_steps):
        dropout.clock.step = step
        dropout.clock.set_chunk(torch.arange(2), torch.arange(3).repeat(2, 1))
        total += dropout(x)
    sigma = x.abs() * (rate / (1 - rate) / num_steps) ** 0.5
    assert bool(((total / num_steps - x).abs() <= 5 * sigma).all())


def test_identity_at_rate_zero_and_in_eval() -> None:
    x = torch.randn(2, 3, 4)
    assert ready(0.0)(x) is x
    assert ready(0.5).eval()(x) is x
    assert not torch.equal(ready(0.5)(x), x)
    assert IdentityDropout(0.0, "module", DropoutClock())(x) is x  # needs no clock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_passes_through_the_same_mask(dtype: torch.dtype) -> None:
    dropout = ready(0.25)  # 1 / 0.75 has to be rounded
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()
    out = dropout(x)
    assert out.dtype == dtype
    keep_BTF = dropout.keep_mask(64).view(2, 3, 64)
    assert 0 < int(keep_BTF.sum()) < keep_BTF.numel()
    assert torch.equal(out == 0, ~keep_BTF)
    (gradient,) = torch.autograd.grad(out, x, torch.full_like(out, 3))
    assert torch.equal(gradient, torch.full_like(gradient, 3) / 0.75 * keep_BTF)


def test_gradient_of_gradient() -> None:
    dropout = ready(0.4)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert 0 < int(dropout.keep_mask(5).sum()) < 30
    assert torch.autograd.gradcheck(dropout, x)
    assert torch.autograd.gradgradcheck(dropout, x)


@pytest.mark.parametrize("layout", ["BTF", "flat", "transposed"])
def test_graph_holds_keys_and_no_mask(layout: str) -> None:
    x = torch.randn(2, 3, 64)
    x = {"BTF": x, "flat": x.flatten(0, 1), "transposed": x.mT.contiguous().mT}[layout]
    dropout, saved = ready(0.3), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = dropout(x.requires_grad_())
    assert [tuple(tensor.shape) for tensor in saved] == [(6,), (64,)]
    assert all(tensor.dtype == torch.int32 for tensor in saved)
    assert torch.equal(out != 0, dropout.keep_mask(64).view(x.shape))


def test_gradient_uses_the_chunk_of_its_forward() -> None:
    dropout = ready(0.5)
    x = torch.ones(2, 3, 64, requires_grad=True)
    out = dropout(x)
    dropout.clock.set_chunk(torch.arange(2) + 5, torch.arange(3).repeat(2, 1))
    other = dropout(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out)
    assert not torch.equal(gradient, other)


def test_a_higher_rate_drops_more_of_the_same() -> None:
    rates = [0.0, 0.1, 0.3, 0.5, 0.7, 0.99]
    masks = [keep(rate, num_texts=4) for rate in rates]
    for lower, higher in itertools.pairwise(masks):
        assert not bool((higher & ~lower).any())
        assert int(higher.sum()) < int(lower.sum())
    assert bool(masks[0].all())


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_rate_out_of_range(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout rate: got {rate}, wanted at least 0 and below"):
        IdentityDropout(rate, "module", DropoutClock())


def test_clock_that_was_not_set() -> None:
    with pytest.raises(AssertionError, match="before the clock was set to a chunk"):
        IdentityDropout(0.5, "module", DropoutClock())(torch.ones(2, 3, 4))


def test_clock_set_to_another_chunk() -> None:
    with pytest.raises(AssertionError, match=r"dropout on \(2, 4, 8\), but the chunk has 6 tokens"):
        ready(0.5)(torch.ones(2, 4, 8))


def test_repr_shows_the_rate() -> None:
    assert repr(ready(0.25)) == "IdentityDropout(p=0.25)"


# --- keys -------------------------------------------------------------------------------------


def reference_keys(clock: DropoutClock, name: str, num_features: int) -> tuple[list[int], ...]:
    """The keys of a module in unsigned integers of any size, as int32."""
    key = zlib.crc32(name.encode())
    assert clock.token_key_L is not None
    words = (
        [absorb(token & MASK_64, key) for token in clock.token_key_L.tolist()],
        [absorb(feature, key + 1) for feature in range(num_features)],
    )
    return tuple([((word + 2**31) & MASK_32) - 2**31 for word in vector] for vector in words)


def assert_keys(dropout: IdentityDropout, name: str, num_features: int = 7) -> None:
    keys = dropout.keys(num_features)
    assert [key.dtype for key in keys] == [torch.int32, torch.int32]
    assert tuple(key.tolist() for key in keys) == reference_keys(dropout.clock, name, num_features)


@pytest.mark.parametrize("words_at_once", [1, 13, 2**20])
def test_keys_of_many_modules(words_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All modules of a clock share one derivation; each gets the keys it would get alone."""
    monkeypatch.setattr("lowmem_cft.model.dropout._WORDS_AT_ONCE", words_at_once)
    clock = DropoutClock(seed=3, step=1)
    names = [f"layers.{i}" for i in range(5)]
    modules = {name: IdentityDropout(0.1, name, clock) for name in [*names, "layers.0"]}
    for place in (0, 4):
        clock.set_chunk(torch.arange(2) + place, torch.arange(3).repeat(2, 1))
        for name, module in modules.items():
            assert_keys(module, name)
    late = IdentityDropout(0.1, "late", clock)  # after the chunk's keys were derived
    assert_keys(late, "late")
    assert_keys(modules["layers.3"], "layers.3", num_features=4)
    assert_keys(modules["layers.3"], "layers.3")


def test_keys_are_derived_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def derive(token_key_L: Tensor, module_keys: list[int]) -> Tensor:
        calls.append(len(module_keys))
        return _derive(token_key_L, module_keys)

    monkeypatch.setattr("lowmem_cft.model.dropout._derive", derive)
    clock = DropoutClock()
    modules = [IdentityDropout(0.1, f"layers.{i}", clock) for i in range(5)]
    for _ in range(3):
        clock.set_chunk(torch.arange(2), torch.arange(3).repeat(2, 1))
        for module in [*modules, *modules]:
            module(torch.ones(2, 3, 4))
    assert calls == [5, 5, 5]
    assert modules[0].keys(4)[1] is modules[0].keys(4)[1], "feature keys are derived once"


def test_keys_of_inference_mode_serve_training() -> None:
    dropout, x = ready(0.5), torch.ones(2, 3, 8, requires_grad=True)
    with torch.inference_mode():
        wanted = dropout(x)
    out = dropout(x)
    assert torch.equal(out, wanted)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], wanted)


def test_copies_of_a_model_keep_their_clock() -> None:
    model = torch.nn.Sequential(ready(0.5))
    model.append(IdentityDropout(0.5, "other", model[0].clock))
    wanted = model(torch.ones(2, 3, 8))
    twin = copy.deepcopy(model)
    assert twin[0].clock is twin[1].clock is not model[0].clock
    assert torch.equal(twin(torch.ones(2, 3, 8)), wanted)
    assert not model.state_dict()


# --- arithmetic -------------------------------------------------------------------------------

MASK_64, MASK_32 = 2**64 - 1, 2**32 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(x: int) -> int:
    """SplitMix64's finaliser in unsigned integers that never overflow."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK_64
    return x ^ (x >> 31)


def absorb(state: int, word: int) -> int:
    return mix64((state * GOLDEN + word) & MASK_64)


def word_of(seed: int, step: int, place: int, position: int, name: str, feature: int) -> int:
    """Unsigned, the order of int32 kept: the sign bit is turned over."""
    key = zlib.crc32(name.encode())
    state = absorb(absorb(absorb(seed & MASK_64, step), place), position)
    x = (absorb(state, key) ^ absorb(feature, key + 1)) & MASK_32
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK_32
    x ^= x >> 15
    x = x * 0x846CA68B & MASK_32
    return x ^ (x >> 16) ^ 0x80000000


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def test_mix_is_splitmix64() -> None:
    published = [  # of SplitMix64 seeded with 1234567
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + (i + 1) * GOLDEN) & MASK_64 for i in range(5)]
    assert [mix64(state) for state in states] == published
    got = _mix64(torch.tensor([signed(state) for state in states]))
    assert got.tolist() == [signed(word) for word in published]


def test_mix_shifts_logically() -> None:
    edges = [0, 1, -1, 2**63 - 1, -(2**63), 2**30, -(2**30), 2**34 - 1]
    random = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([torch.tensor(edges), random])
    assert 400 < int((words < 0).sum()) < 600
    assert _mix64(words).tolist() == [signed(mix64(word & MASK_64)) for word in words.tolist()]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("seed", [0, 42, -3])
def test_mask_equals_unsigned_arithmetic(rate: float, seed: int) -> None:
    got = keep(rate, seed=seed, step=11, name="a.b", num_texts=4, num_positions=5, num_features=16)
    words = torch.tensor(
        [
            [[word_of(seed, 11, b, t, "a.b", f) for f in range(16)] for t in range(5)]
            for b in range(4)
        ]
    )
    assert 0 < int(got.sum()) < got.numel()
    assert torch.equal(got, words >= round(rate * 2**32))


def test_top_bits_are_as_random_as_others() -> None:
    """Sixteen thresholds read the top four bits of the word, the sign bit of int32 first."""
    top = torch.zeros(NUM_TEXTS, NUM_POSITIONS, NUM_FEATURES, dtype=torch.int64)
    for sixteenth in range(1, 16):
        top += keep(sixteenth / 16)
    counts = torch.bincount(top.flatten(), minlength=16).double()
    wanted = top.numel() / 16
    chi2 = float(((counts - wanted) ** 2).sum() / wanted)
    assert len(counts) == 16
    assert abs(chi2 - 15) <= 5 * 30**0.5
    bits = [(top >> bit) & 1 == 1 for bit in range(4)]
    for i, bit in enumerate(bits):
        assert sigmas_of_share(bit, 0.5) <= 5
        assert all(sigmas_of_correlation(bit, other, 0.5) <= 5 for other in bits[:i])
    assert torch.equal(bits[3], keep(0.5))
