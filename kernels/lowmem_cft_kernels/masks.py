"""Which documents a query is compared with, stated by O(M + N) integers, never by an M x N matrix.

Shape suffixes: M query rows, N document columns, P positives per query, K keys per query.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from lowmem_cft_kernels.surroundings import on_device

SHARED = -1
"""Owner of a document that came with no query."""

NO_TARGET = -1
"""Filler in `Candidates.target`: no positive here. A query with nothing else is left out."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The positives of each query and the documents that count as its negatives.

    Values are looked at once, by the first `validate`; do not change them after it.

    Args:
        target: int64 (M,) or (M, P), columns of each query's positives, each named once in a row;
            `NO_TARGET` fills rows that have fewer. A row without any is left out of the loss; its
            query is still a candidate where documents choose among queries.
        owner_N: int64 (N,) or None: i >= 0 for a hard negative that was given to query i,
            `SHARED` for every other document.
        own_only: queries see a document that has an owner only if it is theirs. Where positives
            are compared with documents, they are so with all that did not come with their query.
        query_keys: int64 (M,) or (M, K), with `doc_keys` or not at all. A document whose key
            equals one of the query's is no negative of it: the same text under two row numbers,
            or the query's own text. A query's positives always count. Queries that share a key
            are no negatives of each other, documents of equal keys neither.
        doc_keys: int64 (N,).
        positive_keys: int64 (M,) or (M, L), or None for `query_keys`: where a positive of the
            query is compared with documents, one whose key equals one of these is no negative of
            it: another positive of the query, or of another one that has this positive.
        own_keys: int64 (M,), of the queries' own texts, or None. Where a document that is the
            positive of one query chooses among queries, those whose own key is one of that query's
            `positive_keys` are no negatives of it; where it is that of several, those of its key.
    """

    target: Tensor
    owner_N: Tensor | None = None
    own_only: bool = False
    query_keys: Tensor | None = None
    doc_keys: Tensor | None = None
    positive_keys: Tensor | None = None
    own_keys: Tensor | None = None
    _sound_for: tuple[int, int] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.query_keys is None) != (self.doc_keys is None):
            raise ValueError(
                "query_keys and doc_keys go together: got one of them without the other"
            )
        for name, keys in (("positive_keys", self.positive_keys), ("own_keys", self.own_keys)):
            if keys is not None and self.doc_keys is None:
                raise ValueError(f"{name}: got them without doc_keys, which they go together with")
        if self.own_only and self.owner_N is None:
            raise ValueError("own_only: got True, which needs owner_N")

    @property
    def target_MP(self) -> Tensor:
        """int64 (M, P)."""
        return self.target if self.target.ndim == 2 else self.target[:, None]

    @property
    def query_key_MK(self) -> Tensor | None:
        """int64 (M, K) or None."""
        return _as_columns(self.query_keys)

    @property
    def positive_key_ML(self) -> Tensor | None:
        """int64 (M, L), `query_key_MK` where there are no others, or None."""
        return _as_columns(self.query_keys if self.positive_keys is None else self.positive_keys)

    def validate(self, num_queries: int, num_docs: int) -> None:
        """Raise ValueError where a tensor does not fit M queries and N documents.

        Shapes and dtypes are looked at in every call, values in the first one with these sizes, and
        not again in copies that `to` makes after it. To look at values on a GPU, the host waits
        until all that is queued there is done: validate on the CPU, then call `to`.
        """
        self._check_shapes(num_queries, num_docs)
        if self._sound_for != (num_queries, num_docs):
            self._check_values(num_queries, num_docs)
            object.__setattr__(self, "_sound_for", (num_queries, num_docs))

    def _check_shapes(self, num_queries: int, num_docs: int) -> None:
        for name, vector, length, columns in (
            ("target", self.target, num_queries, True),
            ("owner_N", self.owner_N, num_docs, False),
            ("query_keys", self.query_keys, num_queries, True),
            ("doc_keys", self.doc_keys, num_docs, False),
            ("positive_keys", self.positive_keys, num_queries, True),
            ("own_keys", self.own_keys, num_queries, False),
        ):
            if vector is None:
                continue
            fits = vector.ndim == 1 or (columns and vector.ndim == 2 and vector.shape[1] > 0)
            if vector.dtype != torch.int64 or not fits or len(vector) != length:
                shape = f"({length},)" + (f" or ({length}, 1 or more)" if columns else "")
                raise ValueError(
                    f"{name}: got {vector.dtype} {tuple(vector.shape)}, wanted int64 {shape}"
                )

    def _check_values(self, num_queries: int, num_docs: int) -> None:
        owner_N, target_MP = self.owner_N, self.target_MP
        if owner_N is None or not len(owner_N):
            owner_N = self.target.new_full((1,), SHARED)
        if not target_MP.numel():
            target_MP = self.target.new_full((1, 1), NO_TARGET)
        ordered_MP = target_MP.sort(dim=1).values
        twice_MP = (ordered_MP[:, 1:] == ordered_MP[:, :-1]) & (ordered_MP[:, 1:] != NO_TARGET)
        twice_M = twice_MP.any(dim=1).long()
        # read at once, for on a GPU the host waits for it
        seen = [*owner_N.aminmax(), *target_MP.aminmax(), twice_M.max(), twice_M.argmax()]
        owner_low, owner_high, low, high, twice, row = torch.stack(seen).tolist()
        if owner_low < SHARED or owner_high >= num_queries:
            raise ValueError(
                f"owner_N: got entries in {owner_low}..{owner_high}, wanted "
                f"0..{num_queries - 1}, or {SHARED} for none"
            )
        if low < NO_TARGET or high >= num_docs:
            raise ValueError(
                f"target: got entries in {low}..{high}, wanted 0..{num_docs - 1}, or {NO_TARGET} "
                "for none"
            )
        if twice:
            raise ValueError(
                f"target: got a column twice in row {row} ({self.target_MP[row].tolist()}), wanted "
                "each positive once"
            )

    def to(self, device: torch.device) -> Candidates:
        """The same on another device; to a GPU, the host waits for nothing that is queued there."""
        names = [
            f.name for f in fields(self) if f.init and isinstance(getattr(self, f.name), Tensor)
        ]
        there: dict[str, Any] = {name: on_device(getattr(self, name), device) for name in names}
        moved = replace(self, **there)
        object.__setattr__(moved, "_sound_for", self._sound_for)
        return moved


def _as_columns(keys: Tensor | None) -> Tensor | None:
    return keys if keys is None or keys.ndim == 2 else keys[:, None]
