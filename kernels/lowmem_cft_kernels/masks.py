"""Which documents a query is compared with, stated by O(M + N) integers, never by an M x N matrix.

Shape suffixes: M query rows, N document columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHARED = -1
"""Owner of a document that every query sees."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The positive of each query and the documents that count as its negatives.

    Args:
        target_M: int64 (M,), column of each query's positive.
        owner_N: int64 (N,) or None. `SHARED`: every query sees the document; i >= 0: only query i
            does (a hard negative kept to its own row). None means all are shared.
        query_key_M, doc_key_N: int64 (M,) and (N,), or both None. A document whose key equals the
            query's is no negative of it (the same text under two row numbers). A query's own
            positive always counts.
    """

    target_M: Tensor
    owner_N: Tensor | None = None
    query_key_M: Tensor | None = None
    doc_key_N: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.query_key_M is None) != (self.doc_key_N is None):
            raise ValueError(
                "query_key_M and doc_key_N go together: got one of them without the other"
            )

    def validate(self, num_queries: int, num_docs: int) -> None:
        """Raise ValueError where a vector's length or dtype does not fit M queries, N documents."""
        wanted = {
            "target_M": (self.target_M, num_queries),
            "owner_N": (self.owner_N, num_docs),
            "query_key_M": (self.query_key_M, num_queries),
            "doc_key_N": (self.doc_key_N, num_docs),
        }
        for name, (vector, length) in wanted.items():
            if vector is None:
                continue
            if vector.dtype != torch.int64 or vector.shape != (length,):
                raise ValueError(
                    f"{name}: got {vector.dtype} {tuple(vector.shape)}, wanted int64 ({length},)"
                )
        if num_queries:
            low, high = int(self.target_M.min()), int(self.target_M.max())
            if low < 0 or high >= num_docs:
                raise ValueError(
                    f"target_M: got entries in {low}..{high}, wanted 0..{num_docs - 1}"
                )

    def hidden(self, rows: slice) -> Tensor | None:
        """bool (rows, N): True where the query does not see the document; None if it sees all."""
        hidden_MN = None
        if self.owner_N is not None:
            index_M1 = torch.arange(rows.start, rows.stop, device=self.owner_N.device)[:, None]
            hidden_MN = (self.owner_N != SHARED) & (self.owner_N != index_M1)
        if self.query_key_M is not None and self.doc_key_N is not None:
            same_MN = self.query_key_M[rows, None] == self.doc_key_N
            hidden_MN = same_MN if hidden_MN is None else hidden_MN | same_MN
        if hidden_MN is not None:
            hidden_MN.scatter_(1, self.target_M[rows, None], False)
        return hidden_MN

    def to(self, device: torch.device) -> Candidates:
        """The same on another device."""

        def move(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector.to(device)

        return Candidates(
            target_M=self.target_M.to(device),
            owner_N=move(self.owner_N),
            query_key_M=move(self.query_key_M),
            doc_key_N=move(self.doc_key_N),
        )
