"""The loss of rows of texts, one pair of texts at a time: who may be whose negative, by its text.

Written from what is promised, without keys, columns or matrices: of any pair that is compared, a
query and a document must not be a positive pair in any row of the data, two queries must not share
a positive, nor two documents a query; what a document chooses from must not be a positive of a
query of its own; and no text is compared with itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from loss_cases import Case
from lowmem_cft.data.batches import NO_TEXT, RowTable, step_texts
from lowmem_cft.gradient.step import candidates_of
from lowmem_cft_kernels import SOFTMAXES

Vector = list[float]


@dataclass(frozen=True)
class Row:
    """An anchor, its positive and its negatives, each the number of a text."""

    anchor: int
    positive: int
    negatives: tuple[int, ...] = ()


def table_of(rows: Sequence[Row]) -> RowTable:
    """The rows as training has them."""
    most = max(len(row.negatives) for row in rows)
    negatives = [[*row.negatives, *[NO_TEXT] * (most - len(row.negatives))] for row in rows]
    return RowTable(
        np.array([row.anchor for row in rows]),
        np.array([row.positive for row in rows]),
        np.array(negatives, dtype=np.int64).reshape(len(rows), most),
    )


@dataclass(frozen=True)
class ByText:
    """A batch of rows of the data. `vectors` has each text's; similarities are dot products."""

    data: Sequence[Row]
    batch: Sequence[Row]
    vectors: Sequence[Vector]
    temperature: float

    def is_positive(self, anchor: int, text: int) -> bool:
        """Of the data, in any row."""
        return any(row.anchor == anchor and row.positive == text for row in self.data)

    def positive_pair(self, a: int, b: int) -> bool:
        """One is a positive of the other."""
        return self.is_positive(a, b) or self.is_positive(b, a)

    def anchors_of(self, text: int) -> set[int]:
        """The anchors of any row with this positive."""
        return {row.anchor for row in self.data if row.positive == text}

    def hit(self, a: int, b: int) -> float:
        """The exponential of a logit."""
        products = zip(self.vectors[a], self.vectors[b], strict=True)
        return math.exp(math.fsum(x * y for x, y in products) / self.temperature)

    def documents(self) -> Iterator[tuple[int, int]]:
        """The row that brought it, and the text."""
        for i, row in enumerate(self.batch):
            yield from ((i, text) for text in (row.positive, *row.negatives))

    def query_to_doc(self, i: int) -> Iterator[float]:
        """The documents that are the anchor's negatives."""
        query = self.batch[i].anchor
        for _, text in self.documents():
            if text != query and not self.is_positive(query, text):
                yield self.hit(query, text)

    def doc_to_query(self, i: int) -> Iterator[float]:
        """The anchors that are the positive's negatives."""
        text = self.batch[i].positive
        for row in self.batch:
            shared = self.anchors_of(text) & self.anchors_of(row.anchor)
            if row.anchor != text and not shared and not self.is_positive(row.anchor, text):
                yield self.hit(text, row.anchor)

    def query_to_query(self, i: int) -> Iterator[float]:
        """The anchors that are the anchor's negatives."""
        query, seen = self.batch[i].anchor, {text for _, text in self.documents()}
        for row in self.batch:
            either = self.positive_pair(query, row.anchor)
            both = any(
                self.is_positive(query, text) and self.is_positive(row.anchor, text)
                for text in seen | {row.anchor for row in self.batch}
            )
            if row.anchor != query and not either and not both:
                yield self.hit(query, row.anchor)

    def doc_to_doc(self, i: int) -> Iterator[float]:
        """The documents of other rows that are the positive's negatives."""
        text = self.batch[i].positive
        for j, other in self.documents():
            shared = self.anchors_of(text) & self.anchors_of(other)
            if j != i and other != text and not shared and not self.is_positive(other, text):
                yield self.hit(text, other)

    def loss(self, softmaxes: str) -> float:
        """The mean over rows."""
        losses = []
        for i, row in enumerate(self.batch):
            positive = self.hit(row.anchor, row.positive)
            queries, documents = sum(self.query_to_doc(i)), sum(self.doc_to_query(i))
            within = sum(self.query_to_query(i)) + sum(self.doc_to_doc(i))
            denominators = {
                "one_way": [positive + queries],
                "symmetric": [positive + queries, positive + documents],
                "gte": [2 * positive + queries + documents + within],
                "qwen3": [positive + queries + within],
            }[softmaxes]
            losses += [math.log(total / positive) / len(denominators) for total in denominators]
        return math.fsum(losses) / len(self.batch)


TEXTS, BATCH, TEMPERATURE = 14, 8, 0.7


def drawn_case(seed: int, softmaxes: str) -> tuple[Case, ByText]:
    """Few texts: anchors of several rows, positives of several anchors, copies in every role."""
    draw = np.random.default_rng(seed)
    data = []
    for _ in range(30):
        anchor, positive, *negatives = draw.integers(0, TEXTS, 2 + draw.integers(0, 3)).tolist()
        data.append(Row(anchor, positive, tuple(negatives)))
    rows = draw.permutation(len(data))[:BATCH]
    texts = step_texts(
        table_of(data),
        rows,
        hard_negatives="batch",
        mask_duplicates=True,
        encode_twins_once=True,
        both_ways=softmaxes != "one_way",
    )
    vector_TD = torch.from_numpy(draw.standard_normal((TEXTS, 5)))
    query_MD, doc_ND = vector_TD[texts.text_P][texts.place_S].tensor_split([BATCH])
    options = {"temperature": TEMPERATURE, "softmaxes": SOFTMAXES[softmaxes], "bank": None}
    case = Case(query_MD, doc_ND, candidates_of(texts), options)
    return case, ByText(data, [data[row] for row in rows], vector_TD.tolist(), TEMPERATURE)
