"""Training rows -> token ids and a table of indices: each distinct text is tokenised once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from lowmem_cft.data.batches import NO_TEXT, Indices, RowTable
from lowmem_cft.data.columns import DataError
from lowmem_cft.data.rows import ReadReport, TrainRow, read_training_rows
from lowmem_cft.data.tokens import (
    TextFormat,
    Tokenizer,
    TokenStore,
    document_format,
    query_format,
    tokenize_cached,
)
from lowmem_cft.files import digest
from lowmem_cft.recipe.schema import DataSection, DataSource, Recipe

IN_MEMORY = "memory:"
"""What the path of a source begins with whose rows are in no file; their checksum follows."""

DEMO_TRIPLETS = Path(str(resources.files("lowmem_cft") / "data" / "embedded" / "triplets.jsonl"))


@dataclass(frozen=True)
class Corpus:
    """What is trained on: rows as indices into the token store."""

    table: RowTable
    store: TokenStore
    from_cache: bool


def with_rows(recipe: Recipe, rows: Sequence[TrainRow]) -> Recipe:
    """The recipe of a run on rows in memory, which names them by their checksum.

    Raises:
        DataError: there are no rows, or something else stands among them.
    """
    wrong = next((row for row in rows if not isinstance(row, TrainRow)), None)
    if not rows or wrong is not None:
        got = "none" if not rows else type(wrong).__name__
        raise DataError(f"rows: got {got}, wanted a list of lowmem_cft.TrainRow")
    values = [[row.anchor, row.positive, *row.negatives] for row in rows]
    source = DataSource(path=f"{IN_MEMORY}{digest(values)[:16]}")
    return recipe.with_values("data", sources=[source])


def rows_sha256(rows: Sequence[TrainRow]) -> str:
    """The checksum of rows, in hexadecimal."""
    checksum = hashlib.sha256()
    for row in rows:
        texts = [row.anchor, row.positive, *row.negatives]
        checksum.update(json.dumps(texts).encode() + b"\n")
    return checksum.hexdigest()


def read_sources(
    data: DataSection, *, offline: bool = False
) -> tuple[list[list[TrainRow]], list[ReadReport]]:
    """The rows of every source of the recipe.

    Raises:
        DataError: a source cannot be read or a row is wrong.
    """
    rows_of_sources, reports = [], []
    for source in data.sources:
        if source.path.startswith(IN_MEMORY):
            raise DataError(
                f"{source.path}: the rows of this run were given in memory; give them again"
            )
        rows, report = read_training_rows(
            str(DEMO_TRIPLETS) if source.path == "demo" else source.path,
            columns=source.columns,
            split=source.split,
            where=source.where,
            limit=source.limit,
            seed=source.seed,
            on_bad_row=data.on_bad_row,
            offline=offline,
        )
        rows_of_sources.append(rows)
        reports.append(report)
    return rows_of_sources, reports


def _equal_texts(numbers: Sequence[Mapping[str, int]]) -> Indices | None:
    """Over the texts of all templates, a number that equal ones share; None where none are."""
    if len(numbers) == 1:
        return None
    shared: dict[str, int] = {}
    texts = [text for by_text in numbers for text in by_text]
    return np.array([shared.setdefault(text, len(shared)) for text in texts], dtype=np.int64)


def build_corpus(
    sources: Sequence[Sequence[TrainRow]], recipe: Recipe, tokenizer: Tokenizer, cache: Path
) -> Corpus:
    """Tokenise every distinct text once (per format) and index the rows."""
    rows = [row for source in sources for row in source]
    query, document = query_format(recipe), document_format(recipe)
    numbers: dict[TextFormat, dict[str, int]] = {query: {}, document: {}}

    def number(text_format: TextFormat, text: str) -> int:
        return numbers[text_format].setdefault(text, len(numbers[text_format]))

    most = max((len(row.negatives) for row in rows), default=0)
    anchor_N = np.empty(len(rows), dtype=np.int64)
    positive_N = np.empty(len(rows), dtype=np.int64)
    negative_NK = np.full((len(rows), most), NO_TEXT, dtype=np.int64)
    for i, row in enumerate(rows):
        anchor_N[i] = number(query, row.anchor)
        positive_N[i] = number(document, row.positive)
        for k, negative in enumerate(row.negatives):
            negative_NK[i, k] = number(document, negative)

    parts = [
        tokenize_cached(tokenizer, list(texts), text_format, cache)
        for text_format, texts in numbers.items()
    ]
    store = parts[0][0]
    if query != document:  # the documents stand behind the queries
        store = TokenStore.concatenate([part for part, _ in parts])
        positive_N += len(numbers[query])
        negative_NK[negative_NK != NO_TEXT] += len(numbers[query])
    table = RowTable(anchor_N, positive_N, negative_NK, _equal_texts(list(numbers.values())))
    return Corpus(table, store, all(cached for _, cached in parts))
