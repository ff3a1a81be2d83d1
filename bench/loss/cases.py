"""The inputs that all sides are given, and the gradients that they should find.

Shape suffixes: M query rows, N document columns, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int, int]
"""M, N, D."""

MODES = ("one_way", "symmetric")

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest relative error of a gradient that passes, by dtype of the inputs."""

_EXACT_PRODUCTS = 10**11
_BLOCK = 64 * 2**20
"""Bytes of logits that the formula holds at once."""


@dataclass(frozen=True)
class Task:
    """Inputs and options that all implementations are given."""

    query_MD: Tensor
    doc_ND: Tensor
    mode: str
    temperature: float
    normalize: bool

    @property
    def size(self) -> tuple[int, int, int]:
        """M, N and D."""
        return len(self.query_MD), len(self.doc_ND), self.doc_ND.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.mode == "symmetric"

    @property
    def half(self) -> bool:
        """16-bit inputs."""
        return self.query_MD.element_size() == 2

    def prepared(self, x: Tensor) -> Tensor:
        """Unit rows, for those that leave this to their caller."""
        return F.normalize(x, dim=1) if self.normalize else x


def make_task(
    size: Size, mode: str, dtype: torch.dtype, device: torch.device, temperature: float, norm: bool
) -> Task:
    """Random unit vectors around 32 directions; a positive gets about half of its softmax.

    Vectors of one direction have a cosine of about 0.5. Vectors without such neighbours would put
    nothing of the negatives into the gradients, and a positive that is far closer than they are
    would leave little of the gradients beyond rounding.
    """
    m, n, d = size
    if not 0 < m <= n:
        raise ValueError(f"size: got {m}x{n}x{d}, wanted 0 < M <= N")
    draw = torch.Generator(device).manual_seed(0)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, generator=draw, device=device), dim=1)

    center_KD = unit(32)
    topic_N = torch.arange(n, device=device) % m % len(center_KD)
    own_MD, own_ND = unit(m), unit(n)
    # what a positive shares with its query beside the direction: 1 would make them equal
    share = min(0.9, 2 * temperature * math.log(max(1.0, n / len(center_KD))))
    own_ND[:m] = share * own_MD + math.sqrt(1 - share**2) * own_ND[:m]
    query_MD = F.normalize(center_KD[topic_N[:m]] + own_MD, dim=1)
    doc_ND = F.normalize(center_KD[topic_N] + own_ND, dim=1)
    return Task(query_MD.to(dtype), doc_ND.to(dtype), mode, temperature, norm)


def exact_gradients(task: Task) -> tuple[Tensor, Tensor]:
    """(M, D) and (N, D) by the formula, block of queries by block of queries."""
    m, n, d = task.size
    wide = torch.float64 if m * n * d <= _EXACT_PRODUCTS else torch.float32
    raw = task.query_MD.to(wide), task.doc_ND.to(wide)
    query_MD, doc_ND = (task.prepared(x) for x in raw)
    temperature = task.temperature
    blocks = torch.split(query_MD, max(1, _BLOCK // (n * wide.itemsize)))
    row_parts, col_M = [], query_MD.new_full((m,), -torch.inf)
    for block_RD in blocks:
        logit_RN = block_RD @ doc_ND.T / temperature
        row_parts.append(logit_RN.logsumexp(dim=1))
        col_M = torch.logaddexp(col_M, logit_RN[:, :m].logsumexp(dim=0))
    d_query_MD, d_doc_ND = torch.empty_like(query_MD), torch.zeros_like(doc_ND)
    start = 0
    for block_RD, row_R in zip(blocks, row_parts, strict=True):
        rows = torch.arange(start, start + len(block_RD), device=query_MD.device)
        logit_RN = block_RD @ doc_ND.T / temperature
        grad_RN = (logit_RN - row_R[:, None]).exp()
        if task.symmetric:
            grad_RN[:, :m] += (logit_RN[:, :m] - col_M).exp()
            grad_RN /= 2
        grad_RN[torch.arange(len(rows), device=rows.device), rows] -= 1
        grad_RN /= m * temperature
        d_query_MD[rows] = grad_RN @ doc_ND
        d_doc_ND += grad_RN.T @ block_RD
        start += len(rows)
    if task.normalize:
        for x, unit, d_x in zip(raw, (query_MD, doc_ND), (d_query_MD, d_doc_ND), strict=True):
            d_x -= unit * torch.linalg.vecdot(unit, d_x)[:, None]
            d_x /= torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return d_query_MD, d_doc_ND


def relative_error(got: Sequence[Tensor], exact: Tensor) -> float:
    """Largest difference by the largest entry; not a number is infinitely wrong."""
    if sum(len(piece) for piece in got) != len(exact):
        return math.inf
    worst, start = exact.new_zeros(()), 0
    for piece in got:
        difference = piece.to(exact.dtype) - exact[start : start + len(piece)]
        worst = torch.maximum(worst, difference.abs().amax())
        start += len(piece)
    error = float(worst / exact.abs().amax())
    return error if math.isfinite(error) else math.inf
