"""Texts are cut into chunks by token budget, and a chunk is padded for the encoder.

Shape suffixes: B texts of the chunk, T padded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.machine import to_device


@dataclass(frozen=True)
class TokenBatch:
    """`ids_BT` int64 and `mask_BT` bool (True at real tokens), both (B, T).

    `right_padded` promises that every row's real tokens come first.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    right_padded: bool = False

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            to_device(self.ids_BT, device), to_device(self.mask_BT, device), self.right_padded
        )

    def padded_right(self) -> TokenBatch:
        """The same texts with their real tokens first."""
        if self.right_padded:
            return self
        order_BT = (~self.mask_BT).byte().argsort(dim=1, stable=True)
        ids_BT, mask_BT = self.ids_BT.gather(1, order_BT), self.mask_BT.gather(1, order_BT)
        return TokenBatch(ids_BT, mask_BT, right_padded=True)


def token_positions(mask_BT: Tensor) -> Tensor:
    """int64 (B, T): 0 at each text's first real token, whatever the padding side."""
    return (mask_BT.long().cumsum(dim=1) - 1).clamp_(min=0)


@dataclass(frozen=True)
class Chunk:
    """int64 (B,) places of texts, and the tokens of the chunk when padded."""

    place_B: Tensor
    tokens: int


Cut = Callable[[Tensor, int], Sequence[Chunk]]
"""Cuts places into chunks of at most so many tokens, or of one text."""


def chunk_by_tokens(
    lengths: npt.NDArray[np.int64], token_budget: int, chunk_cost: int = 32
) -> list[npt.NDArray[np.int64]]:
    """Cut texts into chunks of at most `token_budget` padded tokens (one text at least).

    Texts are sorted by length, and the cuts are those with the least total cost: padded tokens
    plus `chunk_cost` per chunk. A large budget alone would pad short texts to the longest.

    Args:
        lengths: int64 (texts,), token counts.
        chunk_cost: what a further chunk costs, in tokens' worth of time.

    Returns:
        Indices into `lengths`, chunk by chunk, longest texts first, so that the chunk that needs
        most memory comes first.
    """
    order = np.argsort(-lengths, kind="stable")
    num_texts = len(order)
    width = np.maximum(lengths[order], 1)
    most = np.maximum(token_budget // width, 1)
    sizes = np.arange(1, num_texts + 1)
    # least[i]: cost of the texts from the i-th longest on; size[i]: of the best chunk there
    least = np.zeros(num_texts + 1, dtype=np.int64)
    size = np.zeros(num_texts, dtype=np.int64)
    for i in range(num_texts - 1, -1, -1):
        end = min(i + int(most[i]), num_texts)
        costs = sizes[: end - i] * width[i] + least[i + 1 : end + 1]
        size[i] = len(costs) - int(costs[::-1].argmin())  # of equal costs the largest chunk
        least[i] = costs[size[i] - 1] + chunk_cost
    chunks, i = [], 0
    while i < num_texts:
        chunks.append(order[i : i + size[i]])
        i += int(size[i])
    return chunks


def cut_by_length(
    lengths_P: npt.NDArray[np.int64], place_B: torch.Tensor, budget: int, chunk_cost: int = 32
) -> list[Chunk]:
    """`chunk_by_tokens` of the texts at int64 (B,) places, as chunks of places."""
    lengths_B = lengths_P[place_B.numpy()]
    return [
        Chunk(place_B[torch.from_numpy(rows)], len(rows) * int(lengths_B[rows].max()))
        for rows in chunk_by_tokens(lengths_B, budget, chunk_cost)
    ]


def pad(
    store: TokenStore,
    indices: npt.NDArray[np.int64],
    pad_id: int,
    side: Literal["left", "right"] = "right",
) -> TokenBatch:
    """The chosen texts as one padded batch on the CPU."""
    rows = [store[int(index)] for index in indices]
    width = max(len(row) for row in rows)
    ids_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask_BT = np.zeros((len(rows), width), dtype=np.bool_)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids_BT[i, place] = row
        mask_BT[i, place] = True
    return TokenBatch(torch.from_numpy(ids_BT), torch.from_numpy(mask_BT), side == "right")
