"""Read training rows and scored sentence pairs from files, saved data sets and the hub.

Every row is checked as it is read, so that bad data stop a run before any model is loaded.
"""

from __future__ import annotations

import itertools
import math
import random
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Literal, TypeVar

from lowmem_cft.data.cells import (
    is_conversation,
    is_instruction_pair,
    passages,
    text_of,
    turns,
)
from lowmem_cft.data.columns import DataError, require, scored_columns, training_columns
from lowmem_cft.data.formats import BadRow, Table, shown, tables

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One training example; without negatives it is a plain pair."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """Two sentences and their gold similarity, on the scale of the source."""

    sentence1: str
    sentence2: str
    score: float


Scalar = str | bool | int | float
"""A value that `where` compares a cell with."""


@dataclass
class ReadReport:
    """What was read: `num_read` counts the rows which `where` kept, bad ones included.

    With several files of different columns, a role lists the names used in any of them. `refused`
    has some of the values that `where` did not keep, by its columns.
    """

    source: str
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    num_read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: dict[str, list[Any]] = field(default_factory=dict)


_REFUSED_KEPT = 5
"""How many values of a column a message lists."""


@dataclass(frozen=True)
class _Request:
    source: str
    split: str
    where: Mapping[str, Scalar] | None
    limit: int | None
    seed: int
    on_bad_row: Literal["error", "skip"]
    offline: bool
    way_out: str
    """Ends the message of a bad row: what a user of the program can do about it."""


# --- public readers -------------------------------------------------------------------------


def read_training_rows(
    source: str,
    *,
    columns: Sequence[str] | None = None,
    split: str = "train",
    where: Mapping[str, Scalar] | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_bad_row: Literal["error", "skip"] = "error",
    offline: bool = False,
) -> tuple[list[TrainRow], ReadReport]:
    """Read (anchor, positive, negatives...) rows from a file, a folder or a hub data set.

    `columns` names the anchor, the positive and any negatives, in this order; without it they
    are found by their usual names. Those of a file without a header are numbers, from "1". A cell may hold any text that `cells.text_of` knows, or a list
    of them: each positive of a list makes its own row. `split` counts only where a source has splits, and
    `limit` draws that many rows at random, reproducibly in `seed`, in the order of the source.

    Raises:
        DataError: the source is missing or unreadable, its columns are unclear or absent, a row
            is bad (with `on_bad_row="error"`), or no usable row is left.
        ValueError: `limit` or `on_bad_row` has no meaning.
    """
    way_out = "fix the row or set `on_bad_row: skip`"
    request = _Request(source, split, where, limit, seed, on_bad_row, offline, way_out)
    find = lambda table: training_columns(table, columns, where or ())
    return _read(request, columns, ("anchor", "positive", "negatives"), find, _training_rows)


def read_scored_pairs(
    source: str,
    *,
    columns: Sequence[str] | None = None,
    split: str = "test",
    where: Mapping[str, Scalar] | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_bad_row: Literal["error", "skip"] = "error",
    offline: bool = False,
) -> tuple[list[ScoredPair], ReadReport]:
    """Read (sentence1, sentence2, score) rows; options and errors as in `read_training_rows`.

    Raises:
        DataError: as in `read_training_rows`; also a score which is not a finite number.
        ValueError: `limit` or `on_bad_row` has no meaning.
    """
    way_out = "fix the row or remove it"
    request = _Request(source, split, where, limit, seed, on_bad_row, offline, way_out)
    find = lambda table: scored_columns(table, columns)
    return _read(request, columns, ("sentence1", "sentence2", "score"), find, _scored_pair)


def _read(
    request: _Request,
    columns: Sequence[str] | None,
    roles: tuple[str, str, str],
    find_columns: Callable[[Table], list[str]],
    build: Callable[[Sequence[str], Sequence[Any]], Iterable[T]],
) -> tuple[list[T], ReadReport]:
    if request.limit is not None and request.limit < 1:
        raise ValueError(f"limit must be at least 1, got {request.limit}")
    if request.on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row must be 'error' or 'skip', got {request.on_bad_row!r}")
    report = ReadReport(request.source)

    def usable_rows() -> Iterator[T]:
        for table in tables(request.source, request.split, request.offline, columns):
            names = find_columns(table)
            _note_columns(report, roles, names)
            yield from _checked(table, names, request, report, build)

    rows = _sample(usable_rows(), request.limit, request.seed)
    if rows:
        return rows, report
    if report.num_read:
        why = f"all {report.num_read} rows are bad: {dict(report.skipped)}; fix them"
    elif request.where:
        why = f"`where: {dict(request.where)}` keeps none; there are"
        why += ",".join(f" {name} {_listed(values)}" for name, values in report.refused.items())
    else:
        why = "it has none; give a source with data"
    raise DataError(f"{request.source}: no usable row: {why}")


def _note_columns(report: ReadReport, roles: Sequence[str], names: list[str]) -> None:
    third: str | list[str] = names[2:] if roles[2] == "negatives" else names[2]
    for role, used in zip(roles, (names[0], names[1], third), strict=True):
        noted = report.columns.setdefault(role, used)
        if noted != used:
            columns = [[name] if isinstance(name, str) else name for name in (noted, used)]
            report.columns[role] = list(dict.fromkeys(itertools.chain(*columns)))


def _checked(
    table: Table,
    names: list[str],
    request: _Request,
    report: ReadReport,
    build: Callable[[Sequence[str], Sequence[Any]], Iterable[T]],
) -> Iterator[T]:
    where = request.where or {}
    require(table, where, "where")
    conditions = list(enumerate(where.values(), len(names)))
    for number, cells in table.rows([*names, *where]):
        try:
            if isinstance(cells, BadRow):
                report.num_read += 1
                raise cells
            if others := [i for i, value in conditions if not _equal(cells[i], value)]:
                _note_refused(report, [*names, *where], cells, others)
                continue
            report.num_read += 1
            built = build(names, cells)
        except BadRow as bad:
            if request.on_bad_row == "error":
                raise DataError(
                    f"{table.name}, {table.unit} {number}{bad.at}: {bad}; {request.way_out}"
                ) from None
            report.skipped[f"{bad.reason}{bad.at}"] += 1
        else:
            yield from built


def _note_refused(
    report: ReadReport, names: Sequence[str], cells: Sequence[Any], places: Iterable[int]
) -> None:
    for place in places:
        values = report.refused.setdefault(names[place], [])
        if len(values) <= _REFUSED_KEPT and cells[place] not in values:
            values.append(cells[place])


def _listed(values: Sequence[Any]) -> str:
    shown = [reprlib.repr(value) for value in values[:_REFUSED_KEPT]]
    return ", ".join(shown) + (", ..." if len(values) > _REFUSED_KEPT else "")


def _equal(cell: Any, value: Scalar) -> bool:
    """Whether a cell holds what `where` wants, in files without types too."""
    if isinstance(value, bool):
        return str(cell).strip().lower() in (("true", "1") if value else ("false", "0"))
    if isinstance(value, (int, float)) and not isinstance(cell, bool):
        try:
            return float(cell) == value
        except (TypeError, ValueError):
            return False
    return str(cell) == value


def _sample(rows: Iterable[T], limit: int | None, seed: int) -> list[T]:
    """Reservoir sampling, so that a small sample of a large source needs little memory."""
    if limit is None:
        return list(rows)
    draw = random.Random(seed).randrange
    sample: list[tuple[int, T]] = []
    for i, row in enumerate(rows):
        if i < limit:
            sample.append((i, row))
        elif (j := draw(i + 1)) < limit:
            sample[j] = (i, row)
    return [row for _, row in sorted(sample, key=itemgetter(0))]


# --- from cells to rows ---------------------------------------------------------------------


def _training_rows(names: Sequence[str], cells: Sequence[Any]) -> Iterable[TrainRow]:
    anchor, positive = cells[0], cells[1]
    if names[0] == names[1] and is_conversation(anchor):
        anchor, positive = _question_and_answer(anchor, names[0])
    paired = is_instruction_pair(anchor)
    negatives = _negatives(names[2:], cells[2:], paired)
    anchor = _text(anchor, names[0])
    positives = passages(positive, paired=paired)
    if not positives:
        raise BadRow("text missing", "got an empty list, wanted a text", names[1])
    return [TrainRow(anchor, _text(p, names[1]), negatives) for p in positives]


def _question_and_answer(messages: Any, name: str) -> list[Any]:
    """The user's text and the assistant's, of a conversation that has one of each and no more."""
    said = turns(messages)
    roles = [role for role, _ in said]
    if roles != ["user", "assistant"]:
        raise BadRow("other turns", f"got messages of {roles}, wanted user, assistant", name)
    return [content for _, content in said]


def _negatives(names: Sequence[str], cells: Sequence[Any], paired: bool) -> tuple[str, ...]:
    """A row's negatives: none, one or many. Empty cells are none; those past the names `where`'s."""
    texts = [
        _text_if_any(item, name)
        for name, cell in zip(names, cells, strict=False)
        for item in passages(cell, paired=paired)
    ]
    return tuple(text for text in texts if text)


def _scored_pair(names: Sequence[str], cells: Sequence[Any]) -> Iterable[ScoredPair]:
    first, second = _text(cells[0], names[0]), _text(cells[1], names[1])
    return (ScoredPair(first, second, _score(cells[2], names[2])),)


def _text(value: Any, name: str) -> str:
    if text := _text_if_any(value, name):
        return text
    if text is None:
        raise BadRow("text missing", "got nothing (null or absent), wanted a text", name)
    raise BadRow("empty text", f"got {reprlib.repr(value)}, wanted a text", name)


def _text_if_any(value: Any, name: str) -> str | None:
    try:
        text = text_of(value)
    except ValueError as error:
        raise BadRow("wrong type", f"got {shown(value)}, {error}", name) from None
    return None if text is None else text.strip()


def _score(value: Any, name: str) -> float:
    try:
        # float() would take True and "1_5", which in a data file are slips of the pen.
        score = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise BadRow("bad score", f"got {shown(value)}, wanted a number such as 0.5", name)
    return score
