"""Dropout as a function of identity: the same token gets the same mask in every chunking.

A mask element depends on (seed, step, place of the text in the batch, position of the token in
its text, module, feature) and on nothing else: not on the order of chunks, on padding, or on how
many random numbers were drawn before. So the second forward of a chunked gradient repeats the
first without saved generator states, and any plan of a step gives the same gradient.

The generator is counter-based: a 64-bit finaliser (the one of SplitMix64; Steele et al. 2014,
doi 10.1145/2660193.2660195) makes one 32-bit key per token and one per feature; two multiply-xor
rounds mix both into the word that is compared with the drop rate.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MASK_32 = 0xFFFFFFFF


def _signed(word: int, bits: int) -> int:
    return word - (1 << bits) if word >= 1 << (bits - 1) else word


_GOLDEN = _signed(0x9E3779B97F4A7C15, 64)
_MIX_A = _signed(0xBF58476D1CE4E5B9, 64)
_MIX_B = _signed(0x94D049BB133111EB, 64)
_ROUND_A = _signed(0x7FEB352D, 32)
_ROUND_B = _signed(0x846CA68B, 32)


def _mix64(x: Tensor) -> Tensor:
    """Bijective mix of int64 words; the masks make torch's arithmetic shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_A
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_B
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _absorb(state: Tensor, word: Tensor | int) -> Tensor:
    return _mix64(state * _GOLDEN + word)


def _to_int32(words: Tensor) -> Tensor:
    return ((words & _MASK_32) - ((words & 0x80000000) << 1)).to(torch.int32)


@dataclass
class DropoutClock:
    """What the masks of the chunk in work depend on, besides module and feature.

    `token_key_L`: int64 (L,), one key per padded token of the chunk, row after row.
    """

    seed: int = 0
    step: int = 0
    token_key_L: Tensor | None = None

    def set_chunk(self, place_B: Tensor, position_BT: Tensor) -> None:
        """Enter a chunk: int64 (B,) places of its texts in the batch, (B, T) token positions."""
        state = torch.full_like(position_BT, self.seed)
        state = _absorb(_absorb(state, self.step), place_B[:, None])
        self.token_key_L = _absorb(state, position_BT).flatten()


class IdentityDropout(nn.Module):
    """Inverted dropout on (B, T, F) or (B * T, F) with masks from the clock's current chunk."""

    def __init__(self, rate: float, name: str, clock: DropoutClock) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"dropout rate: got {rate}, wanted at least 0 and below 1")
        self.p = rate
        self.module_key = zlib.crc32(name.encode())
        self.clock = clock

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def keep_mask(self, num_features: int) -> Tensor:
        """bool (L, F): True where the element is kept."""
        token_key_L = self.clock.token_key_L
        assert token_key_L is not None, "dropout ran before the clock was set to a chunk"
        key_L = _to_int32(_absorb(token_key_L, self.module_key))
        feature_F = torch.arange(num_features, device=key_L.device)
        feature_key_F = _to_int32(_absorb(feature_F, self.module_key + 1))
        word_LF = key_L[:, None] ^ feature_key_F
        word_LF ^= (word_LF >> 16) & 0xFFFF
        word_LF *= _ROUND_A
        word_LF ^= (word_LF >> 15) & 0x1FFFF
        word_LF *= _ROUND_B
        word_LF ^= (word_LF >> 16) & 0xFFFF
        threshold = round(self.p * 2**32) - 2**31
        return word_LF >= threshold

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep_LF = self.keep_mask(x.shape[-1])
        assert keep_LF.numel() == x.numel(), (
            f"dropout on {tuple(x.shape)}, but the chunk has {keep_LF.shape[0]} tokens"
        )
        return x * keep_LF.view(x.shape) / (1 - self.p)
