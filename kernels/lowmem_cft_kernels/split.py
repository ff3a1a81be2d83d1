"""float32 embeddings as sums of two bfloat16 numbers, for products on tensor cores.

    x = high + low (to 2^-17),    high = bfloat16(x),    low = bfloat16(x - high)

A product of two such matrices is taken as high high' + high low' + low high', each product of two
numbers exact, their sum in float32. Of a product of two numbers 2^-15 at most is lost: half in
low low', which is left out, half in the rounding of low. Rounded to bfloat16, as much as 2^-7 would
be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_cft_kernels.problem import strips
from lowmem_cft_kernels.workspace import SPLIT_PADDING, padded


def split(x_RD: Tensor) -> Tensor:
    """(R, 2, W) bfloat16: of each row its high and its low numbers, zeros beyond D."""
    num_rows, width = x_RD.shape
    split_R2W = x_RD.new_empty((num_rows, 2, padded(width, SPLIT_PADDING)), dtype=torch.bfloat16)
    split_R2W[:, :, width:] = 0
    for rows in strips(num_rows, width * x_RD.element_size(), cuda=x_RD.is_cuda):
        high_RD, low_RD = split_R2W[rows, :, :width].unbind(dim=1)
        high_RD.copy_(x_RD[rows])
        low_RD.copy_(x_RD[rows] - high_RD)
    return split_R2W
