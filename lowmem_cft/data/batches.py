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
    def positives_of(self) -> PositivesOf:
        """The positives of every anchor, over all of its rows."""
        return PositivesOf.of_pairs(self.key(self.anchor_N), self.key(self.positive_N))


@dataclass(frozen=True)
class PositivesOf:
    """Each anchor's distinct positives, as keys: those of anchor a from `start[a]` to `start[a + 1]`."""

    start: Indices
    positive: Indices

    @classmethod
    def of_pairs(cls, anchor_N: Indices, positive_N: Indices) -> PositivesOf:
        size = 1 + max(anchor_N.max(initial=0), positive_N.max(initial=0))
        anchor, positive = np.divmod(np.unique(anchor_N * size + positive_N), size)
        return cls(np.searchsorted(anchor, np.arange(size + 1)), positive)

    def query_keys(self, anchor_M: Indices, positive_M: Indices, document_N: Indices) -> Indices:
        """(M, 2 + K): keys whose documents are no negatives of each row's query.

        They are the row's positive, its anchor, and the anchor's other positives among the
        documents, of which K is the most that an anchor has.
        """
        others_MK = self._others(anchor_M, positive_M, document_N)
        return np.concatenate([positive_M[:, None], anchor_M[:, None], others_MK], axis=1)

    def _others(self, anchor_M: Indices, positive_M: Indices, among: Indices) -> Indices:
        """(M, K): the positives of each anchor but one; the anchor fills rows with fewer than K."""
        count_M = self.start[anchor_M + 1] - self.start[anchor_M]
        if count_M.max(initial=0) <= 1:
            return np.empty((len(anchor_M), 0), dtype=np.int64)
        row = np.repeat(np.arange(len(anchor_M)), count_M)
        first_M = self.start[anchor_M] - (count_M.cumsum() - count_M)
        positive = self.positive[np.arange(len(row)) + first_M[row]]
        kept = np.isin(positive, among) & (positive != positive_M[row])
        row, positive = row[kept], positive[kept]
        count_M = np.bincount(row, minlength=len(anchor_M))
        rank = np.arange(len(row)) - (count_M.cumsum() - count_M)[row]
        others_MK = np.repeat(anchor_M[:, None], count_M.max(initial=0), axis=1)
        others_MK[row, rank] = positive
        return others_MK


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
                f"{self.rows_per_epoch} rows; lower it or give more data"
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
    where nothing is masked.
    All int64, on the CPU.
    """

    text_P: Indices
    place_S: Tensor
    num_queries: int
    owner_N: Tensor
    own_only: bool
    query_key_MK: Tensor | None
    doc_key_N: Tensor | None


def step_texts(
    table: RowTable,
    rows: Indices,
    *,
    hard_negatives: str,
    mask_duplicates: bool,
    encode_twins_once: bool,
) -> StepTexts:
    """Gather a step's texts.

    Args:
        hard_negatives: batch, own or none; see `LossSection`.
        mask_duplicates: documents equal to a positive of a query, in whichever of its rows, or to
            the query are no negatives of it.
        encode_twins_once: one pool entry per distinct text. With dropout, twins would share a
            mask, which changes the step; without it, this changes nothing.
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
    query_key_MK = doc_key_N = None
    if mask_duplicates:
        anchor_key_M, positive_key_M = table.key(anchor_M), table.key(positive_M)
        doc_key_N = table.key(document_N)
        query_key_MK = table.positives_of.query_keys(anchor_key_M, positive_key_M, doc_key_N)
    return StepTexts(
        text_P,
        torch.from_numpy(place),
        len(rows),
        torch.from_numpy(owner_N),
        own_only=hard_negatives == "own",
        query_key_MK=None if query_key_MK is None else torch.from_numpy(query_key_MK),
        doc_key_N=None if doc_key_N is None else torch.from_numpy(doc_key_N),
    )
