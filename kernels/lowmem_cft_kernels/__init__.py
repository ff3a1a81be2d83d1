"""Contrastive losses over M queries and N documents, as value and gradient in one call; dropout
whose masks are a function of keys.

`info_nce` and `identity_dropout` pick a path; each has a specification that every path is tested
against. This package needs torch, and triton for its CUDA kernels; it knows neither models nor
trainers.
"""

from lowmem_cft_kernels.dropout import identity_dropout
from lowmem_cft_kernels.info_nce import choose_path, info_nce, info_nce_loss
from lowmem_cft_kernels.masks import Candidates
from lowmem_cft_kernels.options import (
    GTE,
    ONE_WAY,
    QWEN3,
    SOFTMAXES,
    SYMMETRIC,
    Bank,
    Direction,
    FalseNegatives,
    Hardness,
    LossOptions,
    LossPath,
    Negatives,
    Products,
    Softmax,
)
from lowmem_cft_kernels.result import InfoNCEResult, Observed
from lowmem_cft_kernels.temperature import LearnedTemperature
from lowmem_cft_kernels.workspace import split_bytes, workspace_bytes

__all__ = [
    "GTE",
    "ONE_WAY",
    "QWEN3",
    "SOFTMAXES",
    "SYMMETRIC",
    "Bank",
    "Candidates",
    "Direction",
    "FalseNegatives",
    "Hardness",
    "InfoNCEResult",
    "LearnedTemperature",
    "LossOptions",
    "LossPath",
    "Negatives",
    "Observed",
    "Products",
    "Softmax",
    "choose_path",
    "identity_dropout",
    "info_nce",
    "info_nce_loss",
    "split_bytes",
    "workspace_bytes",
]
