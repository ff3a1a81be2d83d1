"""Files, saved data sets and the hub -> records with their line or row numbers.

Only TSV, CSV and JSON lines are read with the standard library alone; `pyarrow` and `datasets`
are imported when a source needs them.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lowmem_cft.data.columns import DataError, Header, is_usual_name
from lowmem_cft.files import nearest_names

_SUFFIXES = (".jsonl", ".json-lines", ".json", ".csv", ".tsv", ".parquet")
_READABLE = f"{', '.join(_SUFFIXES)}, each also as .gz"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?")
_ARROW_TEXT = re.compile(r"(dictionary<values=)?(large_)?string")
_ARROW_NUMBER = re.compile(r"u?int|float|double|halffloat|decimal")
_PEEKED_ROWS = 100
_LONGEST_CELL = 2**31 - 1  # the csv module's own limit of 131,072 characters refuses long documents
_CELL = r'(?:"(?:[^"]|"")*"|[^"\t\r\n]*)'
_QUOTED_CELL = re.compile(rf"(?:^|(?<=\t))({_CELL})(?=\t|$)")
_QUOTED_RECORD = re.compile(rf"{_CELL}(?:\t{_CELL})*\r?\n?")
_LINES_OF_A_CELL = 1000
_NUMBER = re.compile(r"\s*[-+]?[\d.,]*\d([eE][-+]?\d+)?\s*")


class BadRow(Exception):
    """One row is unusable; readers hand it on, since raising would end the reader."""

    def __init__(self, reason: str, detail: str, column: str | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.at = f", column {column!r}" if column is not None else ""


Row = Sequence[Any] | BadRow
_Records = Callable[[Path], Iterator[tuple[int, list[str] | BadRow]]]
_Objects = Callable[[Path], Iterator[tuple[int, dict[str, Any] | BadRow]]]


@dataclass(frozen=True, kw_only=True)
class Table(Header):
    """A source with named columns; `rows(names)` yields the number and cells of each row."""

    unit: Literal["line", "row"]
    rows: Callable[[Sequence[str]], Iterator[tuple[int, Row]]]


def shown(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def tables(
    source: str, split: str, offline: bool, columns: Sequence[str] | None = None
) -> Iterator[Table]:
    """Find the source and open it; a folder of files has one table a file, in name order.

    `columns` that are numbers, and no names of the file's, say that it has no header.

    Raises:
        DataError: the source is missing or unreadable, or has no such split.
    """
    check_source_name(source)
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _folder_tables(path, split, columns)
    elif path.exists():
        yield _file_table(path, columns)
    else:
        yield _hub_table(source, split, offline)


def check_source_name(source: str) -> None:
    """Refuse the name of a local source that does not exist; of other names the hub has to be asked.

    Raises:
        DataError: there is no such file or folder; the message has the nearest names.
    """
    path = Path(source).expanduser()
    if not source.strip():
        # Path("") would be the working folder.
        raise DataError("the source is empty; name a file, a folder or a hub data set")
    if not path.exists() and (_suffix(path) or source.startswith((".", "/", "~"))):
        raise DataError(f"{source}: the file does not exist; {nearest_names(path)}")


def _gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _suffix(path: Path) -> str:
    """The suffix that says how to read the file, without .gz; "" if there is none."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")


def _folder_tables(folder: Path, split: str, columns: Sequence[str] | None) -> Iterator[Table]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        yield _saved_table(folder, split)
        return
    # Hidden files are left out, since macOS writes "._name.csv" beside the real ones.
    paths = [p for p in folder.iterdir() if p.is_file() and _suffix(p) and p.name[0] != "."]
    if not paths:
        raise DataError(f"{folder}: no readable file in this folder; readable are {_READABLE}")
    for path in sorted(paths, key=lambda p: p.name):
        yield _file_table(path, columns)


def _file_table(path: Path, columns: Sequence[str] | None) -> Table:
    suffix = _suffix(path)
    _check_kind(path)
    if suffix in (".jsonl", ".json-lines"):
        return _objects_table(path, "line", _json_objects)
    if suffix == ".json":
        return _json_table(path)
    if suffix in (".csv", ".tsv"):
        return _delimited_table(path, _csv_records if suffix == ".csv" else _tsv_records, columns)
    if suffix == ".parquet":
        return _parquet_table(path)
    raise DataError(f"{path}: unknown kind of file; readable are {_READABLE}")


_BEGINNINGS = {
    b"\x1f\x8b": ("gzip-compressed", "let its name end in .gz"),
    b"PAR1": ("a Parquet file", "let its name end in .parquet"),
    b"PK\x03\x04": ("a zip archive, as Excel's .xlsx is", "unpack it, or save it as CSV"),
    b"\xff\xfe": ("UTF-16, as Excel's Unicode Text is", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16, as Excel's Unicode Text is", "save it as UTF-8"),
}


def _check_kind(path: Path) -> None:
    """Refuse a file that is of another kind than its name says, by its first bytes.

    Raises:
        DataError: it is; the message says which.
    """
    try:
        with path.open("rb") as stream:
            beginning = stream.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot read the file: {error}") from error
    is_gzip = beginning[:2] == b"\x1f\x8b"
    if _gzipped(path):
        if not is_gzip:
            raise DataError(f"{path}: it is not gzip-compressed; let its name end without .gz")
        return
    for magic, (kind, way_out) in _BEGINNINGS.items():
        if beginning.startswith(magic) and not (magic == b"PAR1" and _suffix(path) == ".parquet"):
            raise DataError(f"{path}: it is {kind}; {way_out}")


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
                if number == 1:
                    _check_first(path, raw)
                line = raw.decode("utf-8")
                yield line.removeprefix("\ufeff") if number == 1 else line
                offset += len(raw)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte {error.object[error.start]:#04x} at offset "
            f"{offset + error.start} is not UTF-8; save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}, line {number + 1}: cannot read the file: {error}; write or fetch it again"
        ) from error


def _check_first(path: Path, raw: bytes) -> None:
    """Refuse what is no text in lines, by its first line."""
    if b"\0" in raw:
        raise DataError(f"{path}, line 1: it has NUL bytes, as UTF-16 has; save the file as UTF-8")
    if not raw.endswith(b"\n") and b"\r" in raw.rstrip(b"\r\n") and _suffix(path) != ".json":
        raise DataError(
            f"{path}: its lines end in carriage returns alone, as old Macs wrote them; save it "
            "with line feeds"
        )


def _tsv_records(path: Path) -> Iterator[tuple[int, list[str] | BadRow]]:
    if _is_quoted(path):
        yield from _csv_records(path, "\t")
        return
    for number, line in enumerate(_lines(path), 1):
        if line := line.rstrip("\r\n"):
            yield number, line.split("\t")


def _is_quoted(path: Path) -> bool:
    """Whether a TSV is written as csv.writer, pandas and Excel do: quotes are not part of the text.

    Every quote has to be of that kind, and some cell has to need its quotes, for a quote, comma, tab
    or line end within it, or every cell but numbers has them. In other files quotes are text.
    """
    needed, all_quoted, any_quoted = False, True, False
    for record in _quoted_records(path):
        if '"' not in record:
            cells = record.rstrip("\r\n").split("\t")
        elif _QUOTED_RECORD.fullmatch(record):
            cells = _QUOTED_CELL.findall(record.rstrip("\r\n"))
        else:
            return False
        for cell in cells:
            if cell[:1] == '"':
                any_quoted = True
                needed |= re.search(r'[",\t\n]', cell[1:-1]) is not None
            else:
                all_quoted &= not cell or _NUMBER.fullmatch(cell) is not None
    return needed or (all_quoted and any_quoted)


def _quoted_records(path: Path) -> Iterator[str]:
    """Lines joined until their quotes are paired, and no more of them than a cell may have."""
    joined: list[str] = []
    odd = False
    for line in _lines(path):
        joined.append(line)
        odd ^= line.count('"') % 2 == 1
        if not odd or len(joined) > _LINES_OF_A_CELL:
            yield "".join(joined)
            joined, odd = [], False
    if joined:
        yield "".join(joined)


def _delimiter(path: Path) -> str:
    """What cuts the first lines into equally many cells, else a comma or what the first has for it.

    Excel writes semicolons where 0,5 is a number, and files without a header have commas in texts.
    """
    lines = list(islice(_lines(path), _PEEKED_ROWS))
    marks = [mark for mark in (",", ";", "\t") if mark in "".join(lines[:1])]
    for mark in marks:
        try:
            counts = {len(cells) for cells in csv.reader(lines, delimiter=mark) if cells}
        except csv.Error:
            continue
        if len(counts) == 1 and counts != {1}:
            return mark
    return marks[0] if marks else ","


def _csv_records(
    path: Path, delimiter: str | None = None
) -> Iterator[tuple[int, list[str] | BadRow]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(_lines(path), delimiter=delimiter or _delimiter(path), strict=True)
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
            yield start, BadRow("not valid CSV", str(error))
            continue
        if cells is None:
            return
        if cells:
            yield start, cells


def _delimited_table(path: Path, records: _Records, named: Sequence[str] | None) -> Table:
    """Blank lines are left out, as in the csv module."""
    beginning = list(islice(records(path), _PEEKED_ROWS + 1))
    if not beginning:
        raise DataError(f"{path}: the file is empty; a header line with column names is wanted")
    line, first = beginning[0]
    if isinstance(first, BadRow):
        raise DataError(f"{path}, line {line}: the header is {first}; fix it")
    names = [name.strip() for name in first]
    peeked = [cells for _, cells in beginning[1:] if isinstance(cells, list)]
    headless = _by_number(named, names) or _is_data(names, peeked)
    if headless:
        names = [str(i) for i in range(1, len(first) + 1)]
        peeked = [first, *peeked]
    _no_duplicates(f"{path}, line {line}", names)
    numeric = {names[i] for i in _numeric_places(len(names), peeked)}
    lists = {name for i, name in enumerate(names) if _holds_lists(i, peeked)}

    def rows(columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
        places = [names.index(name) for name in columns]
        like = "in the first line" if headless else "in the header"
        for number, cells in islice(records(path), 0 if headless else 1, None):
            if isinstance(cells, BadRow):
                yield number, cells
            elif len(cells) != len(names):
                detail = f"got {len(cells)}, wanted {len(names)} as {like}"
                yield number, BadRow("wrong number of cells", detail)
            else:
                yield number, _with_lists([cells[i] for i in places], columns, lists)

    return Table(
        name=str(path),
        columns=names,
        text_columns=frozenset(names) - numeric,
        number_columns=frozenset(numeric),
        first=first if headless else None,
        unit="line",
        rows=rows,
    )


def _by_number(named: Sequence[str] | None, header: Sequence[str]) -> bool:
    """Columns are named by number, and the file has none of these names."""
    numbers = bool(named) and all(name.isdecimal() for name in named or ())
    return numbers and not set(named or ()) <= set(header)


def _is_data(first: Sequence[str], peeked: Sequence[Sequence[str]]) -> bool:
    """Whether a first line is a row: where the others have numbers it has one, elsewhere none."""
    numeric = _numeric_places(len(first), peeked)
    numbers = {i for i, cell in enumerate(first) if _NUMBER.fullmatch(cell)}
    return bool(numbers) and numbers == numeric and not any(map(is_usual_name, first))


def _numeric_places(count: int, rows: Sequence[Sequence[str]]) -> set[int]:
    """The columns in which every row that has one has a number."""
    cells = [[row[place] for row in rows if place < len(row)] for place in range(count)]
    return {i for i, column in enumerate(cells) if column and all(map(_NUMBER.fullmatch, column))}


def _holds_lists(place: int, rows: Sequence[Sequence[str]]) -> bool:
    """Whether every cell of a column is a list of texts, as pandas writes one to a file of texts."""
    cells = [row[place] for row in rows if place < len(row) and row[place].strip()]
    return bool(cells) and all(_list_of_texts(cell) is not None for cell in cells)


def _list_of_texts(cell: str) -> list[str] | None:
    """The list that a cell is written as, in Python or JSON; None where it is none."""
    if cell.strip()[:1] != "[" or cell.strip()[-1:] != "]":
        return None
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return value if is_list else None


def _with_lists(cells: list[Any], columns: Sequence[str], lists: set[str]) -> Row:
    """The cells with lists for what is written as one, in the columns that hold lists."""
    for i, name in enumerate(columns):
        if name in lists and cells[i].strip():
            value = _list_of_texts(cells[i])
            if value is None:
                return BadRow("no list", f"got {shown(cells[i])} where others are lists", name)
            cells[i] = value
    return cells


def _no_duplicates(place: str, names: Sequence[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(f"{place}, column {name!r}: the name stands {times} times; rename one")


def _json_table(path: Path) -> Table:
    """An array of objects, or JSON lines under the other name."""
    if next((line for line in _lines(path) if line.strip()), "").lstrip()[:1] != "[":
        _no_single_object(path)
        return _objects_table(path, "line", _json_objects)
    try:
        values = json.loads("".join(_lines(path)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON array ({error}); write it again") from error
    numbered = [
        (
            i,
            value
            if isinstance(value, dict)
            else BadRow("not a JSON object", f"got {shown(value)}"),
        )
        for i, value in enumerate(values, 1)
    ]
    return _objects_table(path, "row", lambda _: iter(numbered))


def _no_single_object(path: Path) -> None:
    """Refuse one object that has the rows in it, or that is written over several lines."""
    lines = [line for line in islice(_lines(path), _PEEKED_ROWS) if line.strip()]
    if lines and isinstance(_json_object(lines[0]), dict) and len(lines) > 1:
        return
    try:
        value = json.loads("".join(_lines(path)))
    except (ValueError, RecursionError):
        return
    inside = list(value.values()) if isinstance(value, dict) else []
    if len(lines) > 1 or (len(inside) == 1 and isinstance(inside[0], (list, dict))):
        raise DataError(
            f"{path}: got one JSON object with the keys {reprlib.repr(list(value))}, wanted an "
            "array of objects, one a row, or an object a line"
        )


def _objects_table(path: Path, unit: Literal["line", "row"], objects: _Objects) -> Table:
    """Reads the objects twice, since a key may first stand in the last one."""
    columns: dict[str, set[type]] = {}
    for _, value in objects(path):
        if isinstance(value, dict):
            for key, cell in value.items():
                columns.setdefault(key, set()).add(type(cell))
    if not columns:
        number, bad = next(objects(path), (0, None))
        if bad is None:
            raise DataError(f"{path}: the file is empty; wanted JSON objects, one a {unit}")
        reason, at = (bad, bad.at) if isinstance(bad, BadRow) else ("no keys", "")
        wanted = f'wanted objects such as {{"anchor": "...", "positive": "..."}}, one a {unit}'
        raise DataError(f"{path}, {unit} {number}{at}: {reason}; {wanted}, and none is one")

    def rows(names: Sequence[str]) -> Iterator[tuple[int, Row]]:
        for number, value in objects(path):
            cells = value if isinstance(value, BadRow) else [value.get(name) for name in names]
            yield number, cells

    def all_of(*types: type) -> frozenset[str]:
        return frozenset(name for name, held in columns.items() if held <= {*types, type(None)})

    return Table(
        name=str(path),
        columns=list(columns),
        text_columns=all_of(str),
        number_columns=all_of(int, float),
        unit=unit,
        rows=rows,
    )


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield number, _json_object(line)


def _json_object(line: str) -> dict[str, Any] | BadRow:
    try:
        value = _DECODER.decode(line)
        if "\\u" in line:
            # Half of a surrogate pair is legal JSON, but would stop the tokenizer later.
            json.dumps(value, ensure_ascii=False).encode()
    except BadRow as bad:
        return bad
    except json.JSONDecodeError as error:
        return BadRow("not a JSON object", f"{error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return BadRow("not a JSON object", f"{error}")
    return value if isinstance(value, dict) else BadRow("not a JSON object", f"got {shown(value)}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadRow("duplicate key", "the key stands more than once in one object", key)
    return unique


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


# --- Arrow: Parquet files, saved data sets, the hub -----------------------------------------


def _arrow_table(
    name: str, schema: Any, read: Callable[[list[str]], Iterator[dict[str, list[Any]]]]
) -> Table:
    def rows(names: Sequence[str]) -> Iterator[tuple[int, Row]]:
        batches = read(list(dict.fromkeys(names)))
        columns = ([batch[name] for name in names] for batch in batches)
        return enumerate((row for cells in columns for row in zip(*cells, strict=True)), 1)

    texts, numbers = (
        frozenset(column.name for column in schema if kind.match(str(column.type)))
        for kind in (_ARROW_TEXT, _ARROW_NUMBER)
    )
    return Table(
        name=name,
        columns=schema.names,
        text_columns=texts,
        number_columns=numbers,
        unit="row",
        rows=rows,
    )


def _parquet_table(path: Path) -> Table:
    import pyarrow.parquet

    def unreadable(error: Exception) -> DataError:
        return DataError(f"{path}: not a readable Parquet file ({error}); write it again")

    try:
        packed = io.BytesIO(gzip.decompress(path.read_bytes())) if _gzipped(path) else path
        file = pyarrow.parquet.ParquetFile(packed)
    except (OSError, EOFError, zlib.error, ValueError, pyarrow.ArrowException) as error:
        raise unreadable(error) from error
    _no_duplicates(str(path), file.schema_arrow.names)

    def read(names: list[str]) -> Iterator[dict[str, list[Any]]]:
        try:
            for batch in file.iter_batches(batch_size=4096, columns=names):
                yield batch.to_pydict()
        except (OSError, pyarrow.ArrowException) as error:
            raise unreadable(error) from error

    return _arrow_table(str(path), file.schema_arrow, read)


def _dataset_table(dataset: Any, name: str) -> Table:
    def read(names: list[str]) -> Iterator[dict[str, list[Any]]]:
        # Left unselected, columns such as images would be loaded with every batch.
        for batch in dataset.select_columns(names).with_format("arrow").iter(batch_size=4096):
            yield batch.to_pydict()

    return _arrow_table(name, dataset.data.schema, read)


def _saved_table(folder: Path, split: str) -> Table:
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


def _hub_table(source: str, split: str, offline: bool) -> Table:
    def not_found(why: str) -> DataError:
        return DataError(
            f"{source}: neither a file nor a reachable data set of this name was found ({why}); "
            "check the path or give a hub id as owner/name or owner/name:config"
        )

    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise not_found("it does not have the form of a hub id")
    if offline:
        raise not_found("offline, so the hub was not asked")
    import datasets

    try:
        loaded = datasets.load_dataset(match["name"], match["config"], split=split)
        return _dataset_table(loaded, f"{source} (split {split})")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise not_found(f"split {split!r}: {type(error).__name__}: {error}") from error
