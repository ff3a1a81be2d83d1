"""Files of training rows in every format, and the error that reading one raises."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lowmem_cft.data.columns import DataError
from lowmem_cft.data.rows import TrainRow, read_training_rows

HEADER = ["anchor", "positive", "negative", "source"]

CELLS = [
    ["a zero", "p zero", "n zero", "x"],
    ['a "one', "p, one", "n 'one'", "y"],
    ["a zwei ü", "p zwei 日本", "n zwei", "x"],
]

ROWS = [TrainRow(a, p, (n,)) for a, p, n, _ in CELLS]


def jsonl(*objects: Any) -> str:
    return "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)


def write(path: Path, text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def write_rows(path: Path, header: list[str] = HEADER, cells: list[list[Any]] = CELLS) -> str:
    """Write one table in the format which the name of the file asks for."""
    name = path.name.removesuffix(".gz")
    objects = [dict(zip(header, row, strict=True)) for row in cells]
    if name.endswith((".jsonl", ".json-lines")):
        return write(path, jsonl(*objects))
    if name.endswith(".tsv"):
        return write(path, "".join("\t".join(row) + "\n" for row in [header, *cells]))
    if name.endswith(".csv"):
        plain = path.with_name("plain")
        with plain.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([header, *cells])
        text = plain.read_bytes()
        plain.unlink()
        return write(path, text)
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), sink)
    return write(path, sink.getvalue().to_pybytes())


def error(source: str, reader: Any = read_training_rows, **options: Any) -> str:
    """The message of the error, which must name the file."""
    with pytest.raises(DataError) as caught:
        reader(source, **options)
    message = str(caught.value)
    assert Path(source).name in message
    return message
