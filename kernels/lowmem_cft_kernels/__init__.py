"""Contrastive losses over M queries and N documents, as value and gradient in one call; dropout
whose masks are a function of keys.

`info_nce` and `identity_dropout` pick a path; each has a specification that every path is tested
against. This package needs torch, and triton for its CUDA kernels; it knows neither models nor
trainers.
"""

from lowmem_cft_kernels.dropout import identity_dropout
from lowmem_cft_kernels.info_nce import InfoNCEResult, Path, info_nce
from lowmem_cft_kernels.masks import Candidates

__all__ = ["Candidates", "InfoNCEResult", "Path", "identity_dropout", "info_nce"]
