"""Which rows a step trains on, and which texts that makes.

The order is a function of (seed, epoch), so a resumed run needs to know its step and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]

NO_TEXT = -1
"""Filler in `RowTable.negative_NK` where a row has fewer negatives than others."""
NO_OWNER = -1
"""In `StepTexts.owner_N`: a row's positive, which is every other row's negative."""


@dataclass(frozen=True)
class RowTable:
    """Rows as indices of T texts. int64; N rows, K the most negatives that a row has.

    `same_T` gives each text a number that equal texts share, whatever template they stand in; None
    where no two texts are equal.
    """

    anchor_N: Indices
    positive_N: Indices
    negative_NK: Indices
    same_T: Indices | None = None

    def __len__(self) -> int:
        return len(self.anchor_N)

    def key(self, text: Indices) -> Indices:
        """What tells a text from others: equal texts have one key."""
        return text if self.same_T is None else self.same_T[text]

    @cached_property
    def positives(self) -> Positives:
        """The pairs of all rows."""
        return Positives.of_pairs(self.key(self.anchor_N), self.key(self.positive_N))


@dataclass(frozen=True)
class Lists:
    """A list of distinct keys for each key: that of key k from `start[k]` to `start[k + 1]`."""

    start: Indices
    value: Indices

    @classmethod
    def of_pairs(cls, key_N: Indices, value_N: Indices) -> Lists:
        size = 1 + max(key_N.max(initial=0), value_N.max(initial=0))
        key, value = np.divmod(np.unique(key_N * size + value_N), size)
        return cls(np.searchsorted(key, np.arange(size + 1)), value)

    def of(self, key_M: Indices) -> tuple[Indices, Indices]:
        """The lists of these keys one after the other: the place among the M, and the value."""
        count_M = self.start[key_M + 1] - self.start[key_M]
        place = np.repeat(np.arange(len(key_M)), count_M)
        first_M = self.start[key_M] - (count_M.cumsum() - count_M)
        return place, self.value[np.arange(len(place)) + first_M[place]]


@dataclass(frozen=True)
class Positives:
    """Who is whose positive, over all rows of an anchor; anchors and positives are keys of texts."""

    of_anchor: Lists
    anchors: Lists

    @classmethod
    def of_pairs(cls, anchor_N: Indices, positive_N: Indices) -> Positives:
        return cls(Lists.of_pairs(anchor_N, positive_N), Lists.of_pairs(positive_N, anchor_N))

    def keys(
        self, anchor_M: Indices, positive_M: Indices, document_N: Indices, *, both_ways: bool
    ) -> dict[str, Indices]:
        """A batch's keys, by their names in `lowmem_cft_kernels.Candidates`.

        `both_ways`: see `step_texts`.
        """
        among = np.append(document_N, anchor_M) if both_ways else document_N
        keys = {"query_keys": self.query_keys(anchor_M, positive_M, among), "doc_keys": document_N}
        if both_ways:
            keys["positive_keys"] = self.positive_keys(positive_M, among)
            # `query_keys` hide the anchors of a positive: others are hidden as positives themselves
            if (self.anchors.start[anchor_M + 1] > self.anchors.start[anchor_M]).any():
                keys["own_keys"] = anchor_M
        return keys

    def query_keys(self, anchor_M: Indices, positive_M: Indices, among: Indices) -> Indices:
        """(M, 2 + K): keys whose texts are no negatives of each row's query.

        They are the row's positive, its anchor, and the anchor's other positives that are `among`
        the candidates.
        """
        place, positive = self.of_anchor.of(anchor_M)
        kept = np.isin(positive, among) & (positive != positive_M[place])
        others_MK = _as_matrix(place[kept], positive[kept], filler_M=anchor_M)
        return np.concatenate([positive_M[:, None], anchor_M[:, None], others_MK], axis=1)

    def positive_keys(self, positive_M: Indices, among: Indices) -> Indices:
        """(M, 1 + K): keys whose documents are no negatives of each row's positive.

        They are its own, its anchors, and their other positives, as far as they are `among` the
        candidates: positives of one query are not each other's negatives.
        """
        positive_U, place_M = np.unique(positive_M, return_inverse=True)
        place, anchor = self.anchors.of(positive_U)
        step, other = self.of_anchor.of(anchor)
        pairs = np.stack([np.append(place, place[step]), np.append(anchor, other)], axis=1)
        kept = np.isin(pairs[:, 1], among) & (pairs[:, 1] != positive_U[pairs[:, 0]])
        place, related = np.unique(pairs[kept], axis=0).T
        related_UK = _as_matrix(place, related, filler_M=positive_U)
        return np.concatenate([positive_M[:, None], related_UK[place_M]], axis=1)


def _as_matrix(place: Indices, value: Indices, *, filler_M: Indices) -> Indices:
    """(M, K): each place's values in a row; places are in order.

    K is the most that one has, rounded up to a power of two: a GPU's kernels are compiled for each K.
    """
    count_M = np.bincount(place, minlength=len(filler_M))
    rank = np.arange(len(place)) - (count_M.cumsum() - count_M)[place]
    most = int(count_M.max(initial=0))
    value_MK = np.repeat(filler_M[:, None], 1 << (most - 1).bit_length() if most else 0, axis=1)
    value_MK[place, rank] = value
    return value_MK


class RowOrder:
    """Logical batches, epoch by epoch, each a random order of the sources' rows.

    Args:
        source_sizes: rows of each source; the table holds them one after the other.
        weights: how often an epoch goes through each source.
        logical_batch: rows per step; an epoch's last rows that do not fill one are left out.

    Raises:
        ValueError: an epoch has fewer rows than one batch.
    """

    def __init__(
        self,
        source_sizes: Sequence[int],
        weights: Sequence[float],
        logical_batch: int,
        seed: int,
    ) -> None:
        self._sizes, self._weights = source_sizes, weights
        self._batch, self._seed = logical_batch, seed
        sizes = zip(source_sizes, weights, strict=True)
        self.rows_per_epoch = sum(round(size * weight) for size, weight in sizes)
        self.steps_per_epoch = self.rows_per_epoch // logical_batch
        if not self.steps_per_epoch:
            raise ValueError(
                f"train.logical_batch: got {logical_batch}, but an epoch has only "
                f"{self.rows_per_epoch} rows in `data.sources`; lower it or give more data"
            )
        self._epoch = lru_cache(maxsize=1)(self._shuffled)

    def _shuffled(self, epoch: int) -> Indices:
        generator = np.random.default_rng([self._seed, epoch])
        parts, start = [], 0
        for size, weight in zip(self._sizes, self._weights, strict=True):
            times, rest = divmod(round(size * weight), size)
            rows = [np.arange(size)] * times + [generator.permutation(size)[:rest]]
            parts.append(np.concatenate(rows) + start)
            start += size
        return generator.permutation(np.concatenate(parts))

    def rows(self, step: int) -> Indices:
        """int64 (logical_batch,): the rows of step 0, 1, 2, ..."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place * self._batch : (place + 1) * self._batch]


@dataclass(frozen=True)
class StepTexts:
    """The texts of one step as one pool of P, and where each role's lie in it.

    `text_P` names each pool entry's text. `place_S` gives each slot of the loss its place in the
    pool: M queries, then N documents, which are every row's positive and then the hard negatives.

    `owner_N`: the query that a hard negative was given to, `NO_OWNER` for a positive.
    `own_only`: a hard negative is one of its owner's alone.
    `query_key_MK`, `doc_key_N`: a document with one of a query's keys is no negative of it; None
    where nothing is masked. `positive_key_MK`: nor is one with these of the row's positive, and no
    query whose `own_key_M` is one of them; both None where only queries choose, and only among
    documents, `own_key_M` also where it would hide nobody.
    All int64, on the CPU.
    """

    text_P: Indices
    place_S: Tensor
    num_queries: int
    owner_N: Tensor
    own_only: bool
    query_key_MK: Tensor | None
    doc_key_N: Tensor | None
    positive_key_MK: Tensor | None = None
    own_key_M: Tensor | None = None


def step_texts(
    table: RowTable,
    rows: Indices,
    *,
    hard_negatives: str,
    mask_duplicates: bool,
    encode_twins_once: bool,
    both_ways: bool = False,
) -> StepTexts:
    """Gather a step's texts.

    Args:
        hard_negatives: batch, own or none; see `LossSection`.
        mask_duplicates: documents equal to a positive of a query, in whichever of its rows, or to
            the query are no negatives of it.
        encode_twins_once: one pool entry per distinct text. With dropout, twins would share a
            mask, which changes the step; without it, this changes nothing.
        both_ways: the loss compares more than queries with documents (`symmetric` and the like):
            there too, positives of one query are masked.
    """
    anchor_M, positive_M = table.anchor_N[rows], table.positive_N[rows]
    negative_MK = table.negative_NK[rows]
    if hard_negatives == "none":
        negative_MK = negative_MK[:, :0]
    there_MK = negative_MK != NO_TEXT
    document_N = np.concatenate([positive_M, negative_MK[there_MK]])
    owner_N = np.concatenate([np.full(len(rows), NO_OWNER), np.nonzero(there_MK)[0]])
    text_P = np.concatenate([anchor_M, document_N])
    place = np.arange(len(text_P))
    if encode_twins_once:
        text_P, place = np.unique(text_P, return_inverse=True)
    keys: dict[str, Indices] = {}
    if mask_duplicates:
        anchor_key_M, positive_key_M = table.key(anchor_M), table.key(positive_M)
        keys = table.positives.keys(
            anchor_key_M, positive_key_M, table.key(document_N), both_ways=both_ways
        )
    query_key_MK, doc_key_N, positive_key_MK, own_key_M = (
        torch.from_numpy(keys[name]) if name in keys else None
        for name in ("query_keys", "doc_keys", "positive_keys", "own_keys")
    )
    return StepTexts(
        text_P,
        torch.from_numpy(place),
        len(rows),
        torch.from_numpy(owner_N),
        own_only=hard_negatives == "own",
        query_key_MK=query_key_MK,
        doc_key_N=doc_key_N,
        positive_key_MK=positive_key_MK,
        own_key_M=own_key_M,
    )
