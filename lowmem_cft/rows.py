"""Read training rows and scored sentence pairs from files, saved data sets and the hub.

Every row is checked as it is read, so that bad data stop a run before any model is loaded.
Only TSV, CSV and JSON lines are read with the standard library alone; `pyarrow` and `datasets`
are imported when a source needs them.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import math
import random
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

__all__ = [
    "DataError",
    "ReadReport",
    "ScoredPair",
    "TrainRow",
    "read_scored_pairs",
    "read_training_rows",
]

T = TypeVar("T")

_SUFFIXES = (".jsonl", ".json-lines", ".csv", ".tsv", ".parquet")
_READABLE = f"{', '.join(_SUFFIXES)}, each also as .gz"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_PEEKED_ROWS = 100

_POSITIVE = r"positives?|pos|positive_passages"
_NEGATIVE = r"negatives?(_\d+)?|neg(_\d+)?|negative_passages|hard_neg(_\d+)?"
_CONVENTIONS = (
    ("anchor", _POSITIVE, _NEGATIVE),
    ("query", _POSITIVE, _NEGATIVE),
    ("sent0", "sent1", _NEGATIVE),
)
_PAIRS = (("question", "answer"), ("query", "response"), ("premise", "hypothesis"))
# What a name says about its place, to keep "negative, positive" from being taken in that order.
_PLACES = (
    "anchor|query|question|premise",
    f"{_POSITIVE}|answer|response|hypothesis",
    _NEGATIVE,
)
_SENTENCES = (("sentence1", "sentence2"), ("text1", "text2"), ("s1", "s2"))
_SCORES = ("score", "similarity_score", "label")
_LABEL_WORDS = {"label", "labels", "class", "score", "scores", "similarity", "rating"}
_ID_WORDS = {"id", "ids", "idx", "index", "guid", "uuid", "source", "split", "subset", "url"}
_NUMBER = re.compile(r"\s*[-+]?[\d.,]*\d([eE][-+]?\d+)?\s*")


class DataError(ValueError):
    """The user's data is wrong; the message says where, what was wanted and the way out."""


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One training example; without negatives it is a plain pair."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """Two sentences and their gold similarity, on the scale of the source."""

    sentence1: str
    sentence2: str
    score: float


@dataclass
class ReadReport:
    """What was read: `num_read` counts the rows which `where` kept, bad ones included.

    With several files of different columns, a role lists the names used in any of them.
    """

    source: str
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    num_read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class _BadRow(Exception):
    """One row is unusable; `on_bad_row` decides whether that stops the reading."""

    def __init__(self, reason: str, detail: str, column: str | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.at = f", column {column!r}" if column is not None else ""


_Row = Sequence[Any] | _BadRow  # readers hand bad rows on, since raising would end the reader
_Records = Callable[[Path], Iterator[tuple[int, list[str] | _BadRow]]]


@dataclass(frozen=True)
class _Table:
    """A source with named columns; `rows(wanted)` yields the number and cells of each row."""

    name: str
    unit: Literal["line", "row"]
    columns: list[str]
    text_columns: frozenset[str]
    rows: Callable[[Sequence[str]], Iterator[tuple[int, _Row]]]


@dataclass(frozen=True)
class _Request:
    source: str
    columns: Sequence[str] | None
    split: str
    where: Mapping[str, str] | None
    limit: int | None
    seed: int
    on_bad_row: Literal["error", "skip"]
    offline: bool


# --- public readers -------------------------------------------------------------------------


def read_training_rows(
    source: str,
    *,
    columns: Sequence[str] | None = None,
    split: str = "train",
    where: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_bad_row: Literal["error", "skip"] = "error",
    offline: bool = False,
) -> tuple[list[TrainRow], ReadReport]:
    """Read (anchor, positive, negatives...) rows from a file, a folder or a hub data set.

    `columns` names the anchor, the positive and any negatives, in this order; without it they
    are found by their usual names. A cell may hold a list of strings or of {"text": ...}: each
    positive of a list makes its own row. `split` counts only where a source has splits, and
    `limit` draws that many rows at random, reproducibly in `seed`, in the order of the source.

    Raises:
        DataError: the source is missing or unreadable, its columns are unclear or absent, a row
            is bad (with `on_bad_row="error"`), or no usable row is left.
        ValueError: `limit` or `on_bad_row` has no meaning.
    """
    request = _Request(source, columns, split, where, limit, seed, on_bad_row, offline)
    return _read(request, ("anchor", "positive", "negatives"), _training_columns, _training_rows)


def read_scored_pairs(
    source: str,
    *,
    columns: Sequence[str] | None = None,
    split: str = "test",
    where: Mapping[str, str] | None = None,
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
    request = _Request(source, columns, split, where, limit, seed, on_bad_row, offline)
    return _read(request, ("sentence1", "sentence2", "score"), _scored_columns, _scored_pair)


def _read(
    request: _Request,
    roles: tuple[str, str, str],
    find_columns: Callable[[_Table, _Request], list[str]],
    build: Callable[[Sequence[str], Sequence[Any]], Iterable[T]],
) -> tuple[list[T], ReadReport]:
    if request.limit is not None and request.limit < 1:
        raise ValueError(f"limit must be at least 1, got {request.limit}")
    if request.on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row must be 'error' or 'skip', got {request.on_bad_row!r}")
    report = ReadReport(request.source)

    def usable_rows() -> Iterator[T]:
        for table in _tables(request):
            names = find_columns(table, request)
            _note_columns(report, roles, names)
            yield from _checked(table, names, request, report, build)

    rows = _sample(usable_rows(), request.limit, request.seed)
    if rows:
        return rows, report
    if report.num_read:
        why = f"all {report.num_read} rows are bad: {dict(report.skipped)}; fix them"
    elif request.where:
        why = f"where={dict(request.where)} keeps none; check the values in these columns"
    else:
        why = "it has none; give a source with data"
    raise DataError(f"{request.source}: no usable row: {why}")


def _checked(
    table: _Table,
    names: list[str],
    request: _Request,
    report: ReadReport,
    build: Callable[[Sequence[str], Sequence[Any]], Iterable[T]],
) -> Iterator[T]:
    where = request.where or {}
    _require(table, where, "where")
    conditions = [(i, str(value)) for i, value in enumerate(where.values(), len(names))]
    for number, cells in table.rows([*names, *where]):
        try:
            if isinstance(cells, _BadRow):
                report.num_read += 1
                raise cells
            if any(str(cells[i]) != value for i, value in conditions):
                continue
            report.num_read += 1
            built = build(names, cells)
        except _BadRow as bad:
            if request.on_bad_row == "error":
                raise DataError(
                    f"{table.name}, {table.unit} {number}{bad.at}: {bad}; "
                    "fix the row or set `on_bad_row: skip`"
                ) from None
            report.skipped[f"{bad.reason}{bad.at}"] += 1
        else:
            yield from built


def _sample(rows: Iterable[T], limit: int | None, seed: int) -> list[T]:
    """Reservoir sampling, so that a small sample of a large source needs little memory."""
    if limit is None:
        return list(rows)
    draw = random.Random(seed).randrange
    kept: list[tuple[int, T]] = []
    for i, row in enumerate(rows):
        if i < limit:
            kept.append((i, row))
        elif (j := draw(i + 1)) < limit:
            kept[j] = (i, row)
    return [row for _, row in sorted(kept, key=itemgetter(0))]


# --- from cells to rows ---------------------------------------------------------------------


def _training_rows(names: Sequence[str], cells: Sequence[Any]) -> Iterable[TrainRow]:
    anchor = _text(cells[0], names[0])
    positive = cells[1]
    negatives = _negatives(names[2:], cells[2:])
    if not isinstance(positive, list):
        return (TrainRow(anchor, _text(positive, names[1]), negatives),)
    if not positive:
        raise _BadRow("text missing", "got an empty list, wanted a text", names[1])
    return [TrainRow(anchor, _text(_passage(p), names[1]), negatives) for p in positive]


def _negatives(names: Sequence[str], cells: Sequence[Any]) -> tuple[str, ...]:
    """Cells past the names are those of `where`. Of several negatives, empty ones are dropped."""
    if len(names) == 1 and not isinstance(cells[0], list):
        return (_text(cells[0], names[0]),)
    found: list[str] = []
    for name, cell in zip(names, cells, strict=False):
        for item in map(_passage, cell if isinstance(cell, list) else (cell,)):
            if item is not None and not (isinstance(item, str) and not item.strip()):
                found.append(_text(item, name))
    if names and not found:
        raise _BadRow("no negative", f"{list(names)} all empty, wanted a text", names[0])
    return tuple(found)


def _passage(item: Any) -> Any:
    return item.get("text") if isinstance(item, dict) else item


def _scored_pair(names: Sequence[str], cells: Sequence[Any]) -> Iterable[ScoredPair]:
    first, second = _text(cells[0], names[0]), _text(cells[1], names[1])
    return (ScoredPair(first, second, _score(cells[2], names[2])),)


def _text(value: Any, name: str) -> str:
    if isinstance(value, str):
        if text := value.strip():
            return text
        raise _BadRow("empty text", f"got {reprlib.repr(value)}, wanted a text", name)
    if value is None:
        raise _BadRow("text missing", "got nothing (null or absent), wanted a text", name)
    raise _BadRow("wrong type", f"got {_shown(value)}, wanted a string", name)


def _score(value: Any, name: str) -> float:
    try:
        # float() would take True and "1_5", which in a data file are slips of the pen.
        score = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise _BadRow("bad score", f"got {_shown(value)}, wanted a finite number", name)
    return score


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


# --- which columns --------------------------------------------------------------------------


def _training_columns(table: _Table, request: _Request) -> list[str]:
    if request.columns is not None:
        return _named(table, request.columns, "anchor, positive, negative...", 2)
    folded = _folded(table)
    for anchor, positive, negative in _CONVENTIONS:
        positives = [name for low, name in folded.items() if re.fullmatch(positive, low)]
        if anchor in folded and len(positives) > 1:
            raise _unclear(table, f"several could be the positive: {positives}")
        if anchor in folded and positives:
            negatives = [low for low in folded if re.fullmatch(negative, low)]
            negatives.sort(key=lambda low: int(re.sub(r"\D", "", low) or 0))
            return [folded[anchor], *positives, *(folded[low] for low in negatives)]
    others = [name for name in table.columns if name not in (request.where or {})]
    return _pair(table, folded, others) or _in_order(table, others)


def _pair(table: _Table, folded: dict[str, str], others: list[str]) -> list[str]:
    """Premise and hypothesis and the like, if no other column could change what they mean."""
    for pair in _PAIRS:
        if not all(low in folded for low in pair):
            continue
        found = [folded[low] for low in pair]
        rest = [name for name in others if name not in found]
        if labels := [name for name in rest if _words(name) & _LABEL_WORDS]:
            raise _unclear(
                table,
                f"the label column {labels[0]!r} may mean that not every pair is a positive one; "
                f"keep the positive ones with `where: {{{labels[0]}: ...}}`",
            )
        if all(_words(name) & _ID_WORDS for name in rest):
            return found
    return []


def _in_order(table: _Table, names: list[str]) -> list[str]:
    if len(names) < 2 or not table.text_columns.issuperset(names):
        raise _unclear(table, "no known names, and not two or more columns which all hold text")
    for i, name in enumerate(names):
        if not name or _words(name) & (_LABEL_WORDS | _ID_WORDS):
            raise _unclear(table, f"no known names, and {name!r} does not look like a text column")
        places = [p for p, names_ in enumerate(_PLACES) if re.fullmatch(names_, name.lower())]
        if places and min(i, 2) not in places:
            raise _unclear(table, f"no known set of names, and {name!r} is out of order")
    return names


def _scored_columns(table: _Table, request: _Request) -> list[str]:
    if request.columns is not None:
        return _named(table, request.columns, "sentence1, sentence2, score", 3, most=3)
    folded = _folded(table)
    scores = [folded[low] for low in _SCORES if low in folded]
    for pair in _SENTENCES:
        if scores and all(low in folded for low in pair):
            return [folded[pair[0]], folded[pair[1]], scores[0]]
    raise _unclear(table, "no known names", "sentence1, sentence2, score")


def _named(
    table: _Table, columns: Sequence[str], order: str, least: int, most: int | None = None
) -> list[str]:
    if isinstance(columns, str) or not least <= len(columns) <= (most or len(columns)):
        raise DataError(f"{table.name}: columns must be a list of {order}, got {columns!r}")
    _require(table, columns, "columns")
    # One text as its own positive is a known method (dropout alone makes the two views differ).
    repeated = [name for name, n in Counter(columns).items() if n > 1]
    if repeated and (most or set(repeated) & set(columns[2:])):
        raise DataError(f"{table.name}, column {repeated[0]!r}: named twice in columns={columns}")
    return list(columns)


def _require(table: _Table, names: Iterable[str], option: str) -> None:
    for name in names:
        if name not in table.columns:
            raise DataError(
                f"{table.name}: no column {name!r}, which `{option}` names; "
                f"its columns are {table.columns}"
            )


def _folded(table: _Table) -> dict[str, str]:
    folded = {name.lower(): name for name in table.columns}
    if len(folded) < len(table.columns):
        raise _unclear(table, "some names differ only in upper and lower case")
    return folded


def _words(name: str) -> set[str]:
    """The words of a snake_case or camelCase name."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}


def _unclear(table: _Table, why: str, order: str = "anchor, positive, negative...") -> DataError:
    return DataError(
        f"{table.name}: cannot tell which columns to use: {why}; its columns are "
        f"{table.columns}; name those to use, in the order {order}, with `columns: [...]`"
    )


def _note_columns(report: ReadReport, roles: Sequence[str], names: list[str]) -> None:
    third: str | list[str] = names[2:] if roles[2] == "negatives" else names[2]
    for role, used in zip(roles, (names[0], names[1], third), strict=True):
        before = report.columns.setdefault(role, used)
        if before != used:
            both = [n for u in (before, used) for n in ([u] if isinstance(u, str) else u)]
            report.columns[role] = list(dict.fromkeys(both))


# --- where the source is --------------------------------------------------------------------


def _tables(request: _Request) -> Iterator[_Table]:
    path = Path(request.source).expanduser()
    if not request.source.strip():
        # Path("") would be the working folder.
        raise DataError("the source is empty; name a file, a folder or a hub data set")
    if path.is_dir():
        yield from _folder_tables(path, request.split)
    elif path.exists():
        yield _file_table(path)
    elif _suffix(path) or request.source.startswith((".", "/", "~")):
        raise DataError(f"{request.source}: the file does not exist; {_nearest(path)}")
    else:
        yield _hub_table(request)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"nor does its folder {path.parent}"
    there = sorted(entry.name for entry in path.parent.iterdir())
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
    return f"nearest in {path.parent}: {', '.join(near) or 'nothing of a similar name'}"


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _suffix(path: Path) -> str:
    """The suffix that says how to read the file, without .gz; "" if there is none."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")


def _folder_tables(folder: Path, split: str) -> Iterator[_Table]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        yield _saved_table(folder, split)
        return
    # Hidden files are left out, since macOS writes "._name.csv" beside the real ones.
    paths = [p for p in folder.iterdir() if p.is_file() and _suffix(p) and p.name[0] != "."]
    if not paths:
        raise DataError(f"{folder}: no readable file in this folder; readable are {_READABLE}")
    for path in sorted(paths, key=lambda p: p.name):
        yield _file_table(path)


def _file_table(path: Path) -> _Table:
    suffix = _suffix(path)
    if suffix in (".jsonl", ".json-lines"):
        return _jsonl_table(path)
    if suffix in (".csv", ".tsv"):
        return _delimited_table(path, _csv_records if suffix == ".csv" else _tsv_records)
    if suffix == ".parquet":
        return _parquet_table(path)
    raise DataError(f"{path}: unknown kind of file; readable are {_READABLE}")


# --- text files -----------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines with their ends.

    Splitting the bytes at line feeds keeps line numbers the same as in an editor, and lets an
    encoding error name its line.
    """
    number = offset = 0
    try:
        # GzipFile by itself is slow at reading lines.
        with io.BufferedReader(gzip.open(path)) if _gzipped(path) else path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                offset += len(raw) - len(line)
                yield line.decode("utf-8")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte {error.object[error.start]:#04x} at offset "
            f"{offset + error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}, line {number + 1}: cannot read the file: {error}") from error


def _tsv_records(path: Path) -> Iterator[tuple[int, list[str] | _BadRow]]:
    for number, line in enumerate(_lines(path), 1):
        if line := line.rstrip("\r\n"):
            yield number, line.split("\t")


def _csv_records(path: Path) -> Iterator[tuple[int, list[str] | _BadRow]]:
    reader = csv.reader(_lines(path), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if reader.line_num > start:
                # Past a broken cell of several lines nobody can tell where the rows begin.
                raise DataError(
                    f"{path}, line {start}: the row from here to line {reader.line_num} is not "
                    f"valid CSV: {error}; close the quotes (a quote inside is written twice)"
                ) from error
            yield start, _BadRow("not valid CSV", str(error))
            continue
        if cells is None:
            return
        if cells:
            yield start, cells


def _delimited_table(path: Path, records: _Records) -> _Table:
    """Blank lines are left out, as in the csv module."""
    beginning = list(islice(records(path), _PEEKED_ROWS + 1))
    if not beginning:
        raise DataError(f"{path}: the file is empty; a header line with column names is wanted")
    line, header = beginning[0]
    if isinstance(header, _BadRow):
        raise DataError(f"{path}, line {line}: the header is {header}; fix it")
    names = [name.strip() for name in header]
    _no_duplicates(f"{path}, line {line}", names)
    peeked = [cells for _, cells in beginning[1:] if isinstance(cells, list)]
    numeric = {
        name
        for i, name in enumerate(names)
        if peeked and all(_NUMBER.fullmatch(cells[i]) for cells in peeked if i < len(cells))
    }

    def rows(wanted: Sequence[str]) -> Iterator[tuple[int, _Row]]:
        pick = itemgetter(*(names.index(name) for name in wanted))
        for number, cells in islice(records(path), 1, None):
            if isinstance(cells, _BadRow):
                yield number, cells
            elif len(cells) != len(names):
                detail = f"got {len(cells)}, wanted {len(names)} as in the header"
                yield number, _BadRow("wrong number of cells", detail)
            else:
                yield number, pick(cells)

    return _Table(str(path), "line", names, frozenset(names) - numeric, rows)


def _no_duplicates(place: str, names: Sequence[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(f"{place}, column {name!r}: the name stands {times} times; rename one")


def _jsonl_table(path: Path) -> _Table:
    """Reads the file twice, since a key may first stand in its last line."""
    columns: dict[str, bool] = {}
    for _, value in _json_objects(path):
        if isinstance(value, dict):
            for key, cell in value.items():
                columns[key] = columns.get(key, True) and (cell is None or isinstance(cell, str))
    if not columns:
        number, found = next(_json_objects(path), (1, "the file is empty"))
        raise DataError(
            f"{path}, line {number}: {found}; no line of the file is an object with keys"
        )

    def rows(wanted: Sequence[str]) -> Iterator[tuple[int, _Row]]:
        for number, value in _json_objects(path):
            if isinstance(value, _BadRow):
                yield number, value
            else:
                yield number, [value.get(name) for name in wanted]

    texts = frozenset(name for name, all_text in columns.items() if all_text)
    return _Table(str(path), "line", list(columns), texts, rows)


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | _BadRow]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield number, _json_object(line)
            except _BadRow as bad:
                yield number, bad


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = _DECODER.decode(line)
        if "\\u" in line:
            # Half of a surrogate pair is legal JSON, but would stop the tokenizer later.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at character {error.pos + 1}"
        raise _BadRow("not a JSON object", detail) from None
    except (ValueError, RecursionError) as error:
        raise _BadRow("not a JSON object", f"{error}") from None
    if not isinstance(value, dict):
        raise _BadRow("not a JSON object", f"got {_shown(value)}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _BadRow("duplicate key", "the key stands more than once in one object", key)
    return unique


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


# --- Arrow: Parquet files, saved data sets, the hub -----------------------------------------


def _arrow_rows(batches: Iterable[Any], wanted: Sequence[str]) -> Iterator[tuple[int, _Row]]:
    columns = ([batch.column(name).to_pylist() for name in wanted] for batch in batches)
    return enumerate((row for cells in columns for row in zip(*cells, strict=True)), 1)


def _parquet_table(path: Path) -> _Table:
    import pyarrow.parquet

    def unreadable(error: Exception) -> DataError:
        return DataError(f"{path}: not a readable Parquet file ({error}); write it again")

    try:
        packed = io.BytesIO(gzip.decompress(path.read_bytes())) if _gzipped(path) else path
        file = pyarrow.parquet.ParquetFile(packed)
    except (OSError, EOFError, zlib.error, ValueError, pyarrow.ArrowException) as error:
        raise unreadable(error) from error
    schema = file.schema_arrow
    _no_duplicates(str(path), schema.names)

    def rows(wanted: Sequence[str]) -> Iterator[tuple[int, _Row]]:
        try:
            batches = file.iter_batches(batch_size=4096, columns=list(dict.fromkeys(wanted)))
            yield from _arrow_rows(batches, wanted)
        except (OSError, pyarrow.ArrowException) as error:
            raise unreadable(error) from error

    return _Table(str(path), "row", schema.names, _arrow_texts(schema), rows)


def _arrow_texts(schema: Any) -> frozenset[str]:
    text = re.compile(r"(dictionary<values=)?(large_)?string")
    return frozenset(column.name for column in schema if text.match(str(column.type)))


def _dataset_table(dataset: Any, name: str) -> _Table:
    def rows(wanted: Sequence[str]) -> Iterator[tuple[int, _Row]]:
        # Left unselected, columns such as images would be loaded with every batch.
        narrow = dataset.select_columns(list(dict.fromkeys(wanted))).with_format("arrow")
        return _arrow_rows(narrow.iter(batch_size=4096), wanted)

    texts = _arrow_texts(dataset.features.arrow_schema)
    return _Table(name, "row", list(dataset.column_names), texts, rows)


def _saved_table(folder: Path, split: str) -> _Table:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{folder}: not a readable saved data set ({type(error).__name__}: {error}); save it "
            "again with save_to_disk"
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        return _dataset_table(saved, str(folder))
    if split not in saved:
        raise DataError(f"{folder}: no split {split!r}; its splits are {list(saved)}")
    return _dataset_table(saved[split], f"{folder} (split {split})")


def _hub_table(request: _Request) -> _Table:
    source, split = request.source, request.split
    cause: Exception | None = None
    match = _HUB_ID.fullmatch(source)
    if match is None:
        why = "it does not have the form of a hub id"
    elif request.offline:
        why = "offline, so the hub was not asked"
    else:
        import datasets

        try:
            loaded = datasets.load_dataset(match["name"], match["config"], split=split)
            return _dataset_table(loaded, f"{source} (split {split})")
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            why, cause = f"split {split!r}: {type(error).__name__}: {error}", error
    raise DataError(
        f"{source}: neither a file nor a reachable data set of this name was found ({why}); "
        "check the path or give a hub id as owner/name or owner/name:config"
    ) from cause
