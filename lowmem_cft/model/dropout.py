"""Dropout as a function of identity: the same token gets the same mask in every chunking.

A mask element depends on (seed, step, place of the text in the batch, position of the token in
its text, module, feature) and on nothing else: not on the order of chunks, on padding, or on how
many random numbers were drawn before. So the second forward of a chunked gradient repeats the
first without saved generator states, and any plan of a step gives the same gradient.

The generator is counter-based: a 64-bit finaliser (the one of SplitMix64; Steele et al. 2014,
doi 10.1145/2660193.2660195) makes one 32-bit key per token and one per feature; the kernel mixes
both into the word that is compared with the drop rate. Its backward pass makes the mask again from
the keys, so a step stores L + F keys for a dropout of (L, F) and no mask.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_cft.machine import to_device
from lowmem_cft_kernels.dropout import check_rate, identity_dropout, keep_mask

_MASK_32 = 0xFFFFFFFF
_WORDS_AT_ONCE = 2**20  # 8 MiB for each temporary of a key derivation


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64
_MIX_A = 0xBF58476D1CE4E5B9 - 2**64
_MIX_B = 0x94D049BB133111EB - 2**64


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
    _row_of: dict[int, int] = field(default_factory=dict, repr=False)  # module key: row below
    _derived_from: Tensor | None = field(default=None, repr=False)
    _key_ML: Tensor | None = field(default=None, repr=False)

    def set_chunk(self, place_B: Tensor, position_BT: Tensor) -> None:
        """Enter a chunk: int64 (B,) places of its texts in the batch, (B, T) token positions."""
        state = torch.full_like(position_BT, self.seed)
        state = _absorb(_absorb(state, self.step), place_B[:, None])
        self.token_key_L = _absorb(state, position_BT).flatten()

    def enrol(self, module_key: int) -> None:
        """Have the token keys of this module derived with those of the others."""
        if module_key not in self._row_of:
            self._row_of[module_key] = len(self._row_of)
            self._derived_from = self._key_ML = None

    def module_key_L(self, module_key: int) -> Tensor:
        """int32 (L,): the token keys of the chunk in one module.

        All modules' at once, when the first of a chunk asks: on a GPU a dozen small launches in
        each module would take longer than the dropout itself.
        """
        assert self.token_key_L is not None, "dropout ran before the clock was set to a chunk"
        self.enrol(module_key)
        if self._key_ML is None or self._derived_from is not self.token_key_L:
            self._key_ML = _derive(self.token_key_L, list(self._row_of))
            self._derived_from = self.token_key_L
        return self._key_ML[self._row_of[module_key]]


@torch.inference_mode(False)  # or autograd could not save what was first derived in that mode
def _derive(token_key_L: Tensor, module_keys: list[int]) -> Tensor:
    """int32 (M, L): the token keys of M modules."""
    group = max(1, _WORDS_AT_ONCE // max(1, len(token_key_L)))
    key_M1 = to_device(torch.tensor(module_keys), token_key_L.device)[:, None]
    groups = torch.split(key_M1, group)
    return torch.cat([_to_int32(_absorb(token_key_L, key_G1)) for key_G1 in groups])


class _Dropout(torch.autograd.Function):
    """`identity_dropout` of (L, F) by int32 keys (L,) and (F,); linear, so its own backward."""

    @staticmethod
    def forward(ctx: Any, x_LF: Tensor, key_L: Tensor, key_F: Tensor, rate: float) -> Tensor:
        ctx.save_for_backward(key_L, key_F)
        ctx.rate = rate
        return identity_dropout(x_LF, key_L, key_F, rate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        key_L, key_F = ctx.saved_tensors
        return _with_gradient(gradients[0], key_L, key_F, ctx.rate), None, None, None


def _with_gradient(x_LF: Tensor, key_L: Tensor, key_F: Tensor, rate: float) -> Tensor:
    """`identity_dropout` with a gradient, and a gradient of that."""
    out_LF: Tensor = _Dropout.apply(x_LF, key_L, key_F, rate)  # type: ignore[no-untyped-call]
    return out_LF


class IdentityDropout(nn.Module):
    """Inverted dropout on (B, T, F) or (B * T, F) with masks from the clock's current chunk."""

    def __init__(self, rate: float, name: str, clock: DropoutClock) -> None:
        super().__init__()
        check_rate(rate)
        self.p = rate
        self.module_key = zlib.crc32(name.encode())
        self.clock = clock
        self._feature_keys: dict[tuple[int, torch.device], Tensor] = {}
        if rate > 0:
            clock.enrol(self.module_key)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def keys(self, num_features: int) -> tuple[Tensor, Tensor]:
        """int32 (L,) and (F,): the keys of the chunk's tokens and of the features."""
        key_L = self.clock.module_key_L(self.module_key)
        return key_L, self._feature_key_F(num_features, key_L.device)

    def _feature_key_F(self, num_features: int, device: torch.device) -> Tensor:
        if (num_features, device) not in self._feature_keys:
            with torch.inference_mode(False):
                feature_F = torch.arange(num_features, device=device)
                key_F = _to_int32(_absorb(feature_F, self.module_key + 1))
            self._feature_keys[num_features, device] = key_F
        return self._feature_keys[num_features, device]

    def keep_mask(self, num_features: int) -> Tensor:
        """bool (L, F): True where the element is kept."""
        return keep_mask(*self.keys(num_features), self.p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        num_features = x.shape[-1]
        key_L, key_F = self.keys(num_features)
        assert len(key_L) * num_features == x.numel(), (
            f"dropout on {tuple(x.shape)}, but the chunk has {len(key_L)} tokens"
        )
        x_LF = x.reshape(len(key_L), num_features)
        return _with_gradient(x_LF, key_L, key_F, self.p).view(x.shape)
