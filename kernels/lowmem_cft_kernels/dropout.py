"""Dropout whose mask is a function of one key per token and one key per feature.

Element (l, f) is kept where hash(key_L[l] ^ key_F[f]) >= rate, the hash read as a share of 2^32.
The hash is the integer finaliser "lowbias32" (Wellons 2018, nullprogram.com/blog/2018/07/31):

    w ^= w >> 16;  w *= 0x7feb352d;  w ^= w >> 15;  w *= 0x846ca68b;  w ^= w >> 16

on unsigned 32-bit words; the result is compared as signed, which turns the order by 2^31 and
nothing else. `keep_mask` and `reference_dropout` state it; every other path gives the same bits.
No mask is ever stored: the backward pass applies the same function to the gradient.

Shape suffixes: L tokens, F features, B tokens of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_cft_kernels.surroundings import why_triton_cannot_start

ROUND_A = 0x7FEB352D
ROUND_B = 0x846CA68B - 2**32  # as int32

BLOCK_ELEMENTS = 2**17
"""Elements of a block per thread: 512 KiB of int32 words, so that they stay in an L2 cache."""
SERIAL_ELEMENTS = 2**15 - 1
"""The most that torch works on in one thread (at::internal::GRAIN_SIZE is one more)."""
PARALLEL_THREADS = 4
"""The least number of threads with which passes in parallel pay. Two threads that wait for each other ten times in each
block gain little on an idle machine, and lose twentyfold where another process takes a core."""

_LOWEST = -(2**31)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of the element
_select = torch.ops.aten.threshold_backward.grad_input
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_rate(rate: float) -> None:
    """Raise ValueError for a rate outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate: got {rate}, wanted at least 0 and below 1")


def keep_threshold(rate: float) -> int:
    """The least int32 word that is kept; a share `rate` of all words, to 2^-33, lies below it."""
    return min(round(rate * 2**32), 2**32 - 1) + _LOWEST


def _check_keys(key_L: Tensor, key_F: Tensor) -> None:
    for name, key in {"key_L": key_L, "key_F": key_F}.items():
        if key.dtype != torch.int32 or key.ndim != 1:
            raise ValueError(
                f"{name}: got {key.dtype} {tuple(key.shape)}, wanted a vector of torch.int32"
            )


def keep_mask(key_L: Tensor, key_F: Tensor, rate: float) -> Tensor:
    """bool (L, F): True where the element is kept. The specification; holds three (L, F) int32.

    Raises:
        ValueError: a rate outside [0, 1); keys that are not int32 vectors.
    """
    check_rate(rate)
    _check_keys(key_L, key_F)
    word_LF = key_L[:, None] ^ key_F
    word_LF ^= (word_LF >> 16) & 0xFFFF  # >> on int32 is arithmetic: the mask makes it logical
    word_LF *= ROUND_A
    word_LF ^= (word_LF >> 15) & 0x1FFFF
    word_LF *= ROUND_B
    word_LF ^= (word_LF >> 16) & 0xFFFF
    return word_LF >= keep_threshold(rate)


def reference_dropout(x_LF: Tensor, key_L: Tensor, key_F: Tensor, rate: float) -> Tensor:
    """`identity_dropout` in one line, for any device and without checks of `x_LF`.

    The product is rounded once from float32 (float64 for float64); a dropped element is +0 even
    where x is not finite.
    """
    return torch.where(keep_mask(key_L, key_F, rate), x_LF * (1 / (1 - rate)), 0)


def identity_dropout(x_LF: Tensor, key_L: Tensor, key_F: Tensor, rate: float) -> Tensor:
    """x * keep / (1 - rate), (L, F) in the dtype of `x_LF`; rate 0 gives `x_LF` itself.

    Knows no autograd: call it in the forward of an `autograd.Function` on the input and in its
    backward, with the same keys, on the gradient.

    Args:
        x_LF: float32, bfloat16, float16 or float64, of any strides.
        key_L, key_F: int32 (L,) and (F,), on the device of `x_LF`.
        rate: share of elements dropped, in [0, 1).

    Raises:
        ValueError: a rate outside [0, 1); dtypes, shapes or devices that do not fit; `x_LF` asks
            for a gradient that this function would not give.
    """
    check_rate(rate)
    _check(x_LF, key_L, key_F)
    if rate == 0 or x_LF.numel() == 0:
        return x_LF
    kind = x_LF.device.type
    if kind == "cpu":
        return _blocked(x_LF, key_L, key_F, rate)
    if kind == "cuda" and x_LF.dtype != torch.float64 and why_triton_cannot_start() is None:
        from lowmem_cft_kernels.triton_dropout import launch_dropout

        return launch_dropout(x_LF, key_L, key_F, keep_threshold(rate), 1 / (1 - rate))
    return reference_dropout(x_LF, key_L, key_F, rate)


def _check(x_LF: Tensor, key_L: Tensor, key_F: Tensor) -> None:
    if x_LF.ndim != 2 or x_LF.dtype not in _DTYPES:
        raise ValueError(
            f"x_LF: got {x_LF.dtype} {tuple(x_LF.shape)}, wanted two dimensions of one of "
            f"{', '.join(map(str, _DTYPES))}; flatten (B, T, F) to (B * T, F)"
        )
    _check_keys(key_L, key_F)
    if (key_L.shape[0], key_F.shape[0]) != x_LF.shape:
        raise ValueError(
            f"keys: got {key_L.shape[0]} of tokens and {key_F.shape[0]} of features, wanted "
            f"{x_LF.shape[0]} and {x_LF.shape[1]} for x_LF {tuple(x_LF.shape)}"
        )
    if key_L.device != x_LF.device or key_F.device != x_LF.device:
        raise ValueError(
            f"keys: got them on {key_L.device} and {key_F.device}, wanted both where x_LF is, "
            f"on {x_LF.device}"
        )
    if x_LF.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "x_LF: got a tensor that requires a gradient, wanted none, as this function gives no "
            "gradient; wrap it in an autograd.Function or call it under torch.no_grad()"
        )


def _blocked(x_LF: Tensor, key_L: Tensor, key_F: Tensor, rate: float) -> Tensor:
    """Blocks of rows whose words stay in cache.

    Three identities save passes over the words and change no bit:
    - the first xor-shift is linear, so it is applied to the keys before they meet;
    - the last one changes the low half only, which decides where the high half equals the
      threshold's: there the word's high half is a constant, so xor with that constant does it;
    - `threshold_backward` (x where word > t, else 0) selects in one vectorised pass on the bits
      of x read as integers; torch.where is ten times slower.
    """
    threshold, scale = keep_threshold(rate), 1 / (1 - rate)
    if threshold == _LOWEST:  # a rate below 2^-33: all are kept, and threshold - 1 is no int32
        return x_LF * scale
    key_L1, key_F = _xor_shifted(key_L)[:, None], _xor_shifted(key_F)
    out_LF = torch.empty_like(x_LF, memory_format=torch.contiguous_format)
    bits = _BITS[x_LF.element_size()]
    in_place = bits == torch.int32  # the words lie where the result will
    num_tokens, num_features = x_LF.shape
    rows = min(num_tokens, max(1, _block_elements() // num_features))
    scratch = torch.empty(2 - in_place, rows, num_features, dtype=torch.int32)
    wholes = (key_L1, x_LF.view(bits), out_LF.view(bits), out_LF)
    blocks = zip(*(torch.split(whole, rows) for whole in wholes), strict=True)
    for key_B1, x_BF, bits_BF, out_BF in blocks:
        shifted_BF = scratch[0, : len(x_BF)]
        word_BF = bits_BF if in_place else scratch[1, : len(x_BF)]
        torch.bitwise_xor(key_B1, key_F, out=word_BF)
        _hash(word_BF, shifted_BF, low_half=(threshold >> 16) & 0xFFFF)
        limit = threshold - 1
        if not in_place:
            word_BF, limit = word_BF.ge_(threshold).to(bits), 0
        _select(x_BF, word_BF, limit, grad_input=bits_BF)
        out_BF.mul_(scale)
    return out_LF


def _block_elements() -> int:
    threads = torch.get_num_threads()
    if threads == 1:
        return BLOCK_ELEMENTS
    return SERIAL_ELEMENTS if threads < PARALLEL_THREADS else BLOCK_ELEMENTS * threads


def _xor_shifted(key: Tensor) -> Tensor:
    return key ^ ((key >> 16) & 0xFFFF)


def _hash(word: Tensor, shifted: Tensor, low_half: int) -> None:
    """Apply the rounds after the first xor-shift in place; `shifted` is scratch of that shape."""
    word.mul_(ROUND_A)
    torch.bitwise_right_shift(word, 15, out=shifted)
    word.bitwise_xor_(shifted.bitwise_and_(0x1FFFF))
    word.mul_(ROUND_B).bitwise_xor_(low_half)
