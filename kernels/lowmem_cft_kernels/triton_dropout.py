"""Identity dropout in one pass on the GPU: load, hash, select, store. See `dropout`."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

BLOCK_L, BLOCK_F = 16, 128
"""Tile of one program: 16 elements for each of the 128 threads of four warps."""

LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
"""Nothing here could be fused; said outright, because triton warns where it is left open."""


@triton.jit
def keep_tile(key_L1, key_1F, threshold):  # type: ignore[no-untyped-def]
    """bool (L, F) from int32 (L, 1) and (1, F): `dropout.keep_mask` of a tile, for any kernel."""
    word = key_L1.to(tl.uint32, bitcast=True) ^ key_1F.to(tl.uint32, bitcast=True)
    word ^= word >> 16
    word *= 0x7FEB352D
    word ^= word >> 15
    word *= 0x846CA68B
    word ^= word >> 16
    return word.to(tl.int32, bitcast=True) >= threshold


# A rate is no reason to compile again: 1 and multiples of 16 would be kernels of their own.
@triton.jit(do_not_specialize=["threshold", "scale"])  # type: ignore[untyped-decorator]
def dropout_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    key_l_ptr,
    key_f_ptr,
    out_ptr,
    num_tokens,
    num_features,
    threshold,
    scale,
    WIDE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Contiguous (L, F) `x` to `out`; WIDE: offsets need 64 bits."""
    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    key_l = tl.load(key_l_ptr + row, mask=row < num_tokens, other=0)
    key_f = tl.load(key_f_ptr + column, mask=column < num_features, other=0)
    inside = (row < num_tokens) & (column < num_features)
    if WIDE:
        row = row.to(tl.int64)
    offset = row * num_features + column
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    out = tl.where(keep_tile(key_l, key_f, threshold), x * scale, 0.0)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=inside)


def launch_dropout(
    x_LF: Tensor, key_L: Tensor, key_F: Tensor, threshold: int, scale: float
) -> Tensor:
    """`dropout.identity_dropout` for float32, bfloat16 and float16, its arguments checked before."""
    x_LF = x_LF.contiguous()
    out_LF = torch.empty_like(x_LF)
    num_tokens, num_features = x_LF.shape
    grid = (triton.cdiv(num_tokens, BLOCK_L), triton.cdiv(num_features, BLOCK_F))
    with torch.cuda.device_of(x_LF):  # type: ignore[no-untyped-call]
        dropout_kernel[grid](
            x_LF,
            key_L.contiguous(),
            key_F.contiguous(),
            out_LF,
            num_tokens,
            num_features,
            threshold,
            scale,
            # the last tile's masked rows count too: their offsets must not wrap
            WIDE=(num_tokens + BLOCK_L) * num_features + BLOCK_F >= 2**31,
            BLOCK_L=BLOCK_L,
            BLOCK_F=BLOCK_F,
            **LAUNCH,
        )
    return out_LF
