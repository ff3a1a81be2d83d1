"""Every source format, every column convention and every error of the row reader."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lowmem_cft.data.columns import DataError
from lowmem_cft.data.rows import ScoredPair, TrainRow, read_scored_pairs, read_training_rows
from places import ROOT

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


# --- formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json-lines", ".csv", ".tsv", ".parquet", ".TSV"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, packed: str) -> None:
    plain = Path(write_rows(tmp_path / f"data{suffix.lower()}{packed}"))
    path = plain.rename(tmp_path / f"data{suffix}{packed}")
    rows, report = read_training_rows(str(path))
    assert rows == ROWS
    assert report.source == str(path)
    assert report.num_read == 3
    assert report.skipped == Counter()
    assert report.columns == {
        "anchor": "anchor",
        "positive": "positive",
        "negatives": ["negative"],
    }


def test_rows_are_immutable() -> None:
    with pytest.raises(AttributeError):
        ROWS[0].anchor = "other"  # type: ignore[misc]


def test_a_directory_is_read_in_name_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.tsv.gz", cells=CELLS[1:2])
    write_rows(tmp_path / "c.parquet", cells=CELLS[2:])
    write(tmp_path / "a.jsonl", jsonl({"query": "q", "pos": ["p"], "neg": ["n", "m"]}))
    write(tmp_path / "README.md", "not data")
    write(tmp_path / "._b.tsv", b"\x00\x05\x16\x07")
    rows, report = read_training_rows(str(tmp_path))
    assert rows == [TrainRow("q", "p", ("n", "m")), *ROWS[1:]]
    assert report.num_read == 3
    assert report.columns == {
        "anchor": ["query", "anchor"],
        "positive": ["pos", "positive"],
        "negatives": ["neg", "negative"],
    }


def test_an_error_in_a_directory_names_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.tsv")
    write_rows(tmp_path / "b.tsv", cells=[CELLS[0], ["a", " ", "n", "x"]])
    message = error(str(tmp_path))
    assert "b.tsv, line 3, column 'positive': empty text" in message


@pytest.mark.parametrize("name", [None, "README.md", "data.txt"])
def test_a_directory_without_data_is_an_error(tmp_path: Path, name: str | None) -> None:
    if name:
        write(tmp_path / name, "x")
    message = error(str(tmp_path))
    assert "no readable file" in message
    assert ".jsonl" in message
    assert ".parquet" in message


def test_saved_data_sets(tmp_path: Path) -> None:
    import datasets

    objects = [dict(zip(HEADER, row, strict=True)) for row in CELLS]
    # A selection is saved with the rows in another order than they were made in.
    one = datasets.Dataset.from_list(objects).select([2, 0])
    one.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict(train=one, dev=datasets.Dataset.from_list(objects[1:2]))
    both.save_to_disk(tmp_path / "both")
    assert read_training_rows(str(tmp_path / "one"))[0] == [ROWS[2], ROWS[0]]
    assert read_training_rows(str(tmp_path / "both"))[0] == [ROWS[2], ROWS[0]]
    assert read_training_rows(str(tmp_path / "both"), split="dev")[0] == [ROWS[1]]
    message = error(str(tmp_path / "both"), split="test")
    assert "'test'" in message
    assert "['train', 'dev']" in message
    bad = datasets.Dataset.from_list([*objects, {**objects[0], "anchor": ""}])
    bad.save_to_disk(tmp_path / "bad")
    assert "row 4, column 'anchor': empty text" in error(str(tmp_path / "bad"))
    (tmp_path / "bad" / "state.json").write_text("{")
    assert "not a readable saved data set" in error(str(tmp_path / "bad"))


# --- sources that are not there -------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.jsonl", "trian.csv.gz", "sub/train.tsv"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / "train.csv.gz")
    message = error(str(tmp_path / name))
    assert "does not exist" in message
    if "/" in name:
        assert f"nor does its folder {tmp_path / 'sub'}" in message
    else:
        assert f"nearest in {tmp_path}: train.csv.gz" in message


def test_a_missing_relative_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("missing.csv", "./missing", "owner/missing.tsv", "~/no-such-dir-here/x"):
        assert "does not exist" in error(source)
    with pytest.raises(DataError, match="source is empty"):
        read_training_rows("")


def test_an_unknown_kind_of_file(tmp_path: Path) -> None:
    message = error(write(tmp_path / "data.xlsx", "x"))
    assert "unknown kind of file" in message
    assert ".jsonl, .json-lines, .csv, .tsv, .parquet" in message


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the hub: knows owner/name only, and records what it was asked."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if name == "owner/none":
            raise datasets.exceptions.DatasetNotFoundError("no such data set")
        if name == "owner/cut":
            raise ConnectionError("no network")
        return datasets.Dataset.from_dict({"anchor": ["a"], "positive": ["p"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_data_set(hub: list[tuple[Any, ...]]) -> None:
    rows, report = read_training_rows("owner/name")
    assert rows == [TrainRow("a", "p", ())]
    assert report.columns["negatives"] == []
    read_training_rows("owner/name:pair-1", split="dev")
    assert hub == [("owner/name", None, "train"), ("owner/name", "pair-1", "dev")]


@pytest.mark.parametrize("name", ["owner/none", "owner/cut"])
def test_an_unreachable_hub_data_set(hub: list[tuple[Any, ...]], name: str) -> None:
    with pytest.raises(DataError, match="neither a file nor a reachable data set") as caught:
        read_training_rows(name)
    assert name in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(hub) == 1


@pytest.mark.parametrize("name", ["owner/name", "owner/name:config", "name", "a/b/c", "a b/c"])
def test_offline_and_odd_names_never_ask_the_hub(hub: list[tuple[Any, ...]], name: str) -> None:
    assert "neither a file nor a reachable data set" in error(name, offline=True)
    assert hub == []


# --- text details ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_byte_order_mark_is_accepted(tmp_path: Path, suffix: str) -> None:
    path = Path(write_rows(tmp_path / f"data{suffix}"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    rows, report = read_training_rows(str(path))
    assert rows == ROWS
    assert report.columns["anchor"] == "anchor"


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_windows_line_ends_and_blank_lines(tmp_path: Path, suffix: str) -> None:
    text = "anchor,positive\r\na,p\r\n\r\nb,q\r\n\r\n".replace(
        ",", "," if suffix == ".csv" else "\t"
    )
    rows, report = read_training_rows(write(tmp_path / f"data{suffix}", text))
    assert rows == [TrainRow("a", "p", ()), TrainRow("b", "q", ())]
    assert report.num_read == 2


def test_quotes_in_tsv_are_text(tmp_path: Path) -> None:
    text = 'anchor\tpositive\n"open\t"closed"\n""\t\'\n'
    rows, _ = read_training_rows(write(tmp_path / "q.tsv", text))
    assert rows == [TrainRow('"open', '"closed"', ()), TrainRow('""', "'", ())]


def test_only_the_ends_of_a_text_are_stripped(tmp_path: Path) -> None:
    text = jsonl({"anchor": " \ta  b\n", "positive": "p\n\nq \u00a0"})
    rows, _ = read_training_rows(write(tmp_path / "s.jsonl", text))
    assert rows == [TrainRow("a  b", "p\n\nq", ())]


MULTI_LINE = 'anchor,positive\n"a\nstill a\n\nand more","p ""said"" so"\n'


def test_lines_are_counted_through_csv_cells_of_several_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", MULTI_LINE + "b,q\n")
    assert read_training_rows(path)[0] == [
        TrainRow("a\nstill a\n\nand more", 'p "said" so', ()),
        TrainRow("b", "q", ()),
    ]
    # The second row of data starts in line 6, the third spans lines 7 and 8.
    assert "m.csv, line 6, column 'positive'" in error(
        write(tmp_path / "m.csv", MULTI_LINE + "b,\n")
    )
    late = write(tmp_path / "m.csv", MULTI_LINE + 'b,q\n"c\nd",\n')
    assert "m.csv, line 7, column 'positive'" in error(late)


def test_odd_line_ends_inside_a_text_do_not_shift_the_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "u.tsv", "anchor\tpositive\na\u2028b\x0cc\x85d\tp\n\tq\n")
    assert "u.tsv, line 3, column 'anchor'" in error(path)
    rows, _ = read_training_rows(path, on_bad_row="skip")
    assert rows == [TrainRow("a\u2028b\x0cc\x85d", "p", ())]


@pytest.mark.parametrize("name", ["e.csv", "e.tsv", "e.tsv.gz", "e.jsonl"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bad_encoding(tmp_path: Path, name: str, mark: bytes) -> None:
    start = mark + {"e.csv": b"anchor,positive\na,p\n", "e.jsonl": b"{}\n{}\n"}.get(
        name, b"anchor\tpositive\na\tp\n"
    )
    path = write(tmp_path / name, start + b"caf\xe9\tx\n")
    message = error(path, on_bad_row="skip")
    assert f"{name}, line 3: byte 0xe9 at offset {len(start) + 3} is not UTF-8" in message


@pytest.mark.parametrize("name", ["g.tsv.gz", "g.jsonl.gz", "g.parquet.gz", "g.parquet"])
def test_broken_files(tmp_path: Path, name: str) -> None:
    path = Path(write_rows(tmp_path / name, cells=CELLS * 50))
    path.write_bytes(path.read_bytes()[:60])
    assert "read" in error(str(path), on_bad_row="skip")
    path.write_bytes(b"this is neither gzip nor Parquet")
    assert "read" in error(str(path), on_bad_row="skip")


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    assert "the file is empty" in error(write(tmp_path / name, ""))


def test_duplicate_names_in_the_header(tmp_path: Path) -> None:
    for name, text in {"d.csv": "anchor, anchor,positive\n", "d.tsv": "x\tpositive\tx\n"}.items():
        column = "anchor" if name == "d.csv" else "x"
        assert f"{name}, line 1, column '{column}'" in error(write(tmp_path / name, text))
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"]], names=["anchor", "anchor"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert "column 'anchor'" in error(str(tmp_path / "d.parquet"))


# --- columns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "used"),
    [
        (["id", "positive", "anchor"], ["anchor", "positive"]),
        (["Anchor", "POSITIVE", "Negative", "label"], ["Anchor", "POSITIVE", "Negative"]),
        (
            ["negative_10", "negative_2", "negative_1", "anchor", "positive"],
            ["anchor", "positive", "negative_1", "negative_2", "negative_10"],
        ),
        (["query", "pos", "neg"], ["query", "pos", "neg"]),
        (["query", "positive", "negative_1"], ["query", "positive", "negative_1"]),
        (["sent0", "sent1", "hard_neg"], ["sent0", "sent1", "hard_neg"]),
        (["answer", "question"], ["question", "answer"]),
        (["query", "response", "doc_id"], ["query", "response"]),
        (["premise", "hypothesis"], ["premise", "hypothesis"]),
        (["first", "second"], ["first", "second"]),
        (["first", "second", "third", "fourth"], ["first", "second", "third", "fourth"]),
        (["query", "passage"], ["query", "passage"]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_are_found(tmp_path: Path, header: list[str], used: list[str], suffix: str) -> None:
    path = write_rows(tmp_path / f"c{suffix}", header, [[f"text of {name}" for name in header]])
    rows, report = read_training_rows(path)
    anchor, positive, *negatives = (f"text of {name}" for name in used)
    assert rows == [TrainRow(anchor, positive, tuple(negatives))]
    assert report.columns == {"anchor": used[0], "positive": used[1], "negatives": used[2:]}


@pytest.mark.parametrize(
    "header",
    [
        ["only"],
        ["text", "text2", "label"],
        ["text", "text2", "similarity_score"],
        ["pairID", "text", "text2"],
        ["", "text", "text2"],
        ["text", "text2", "source"],
        ["question", "context", "answer"],
        ["negative", "positive"],
        ["passage", "query"],
        ["query", "pos", "positive"],
        ["anchor", "Anchor", "positive"],
    ],
)
def test_unclear_columns_are_listed(tmp_path: Path, header: list[str]) -> None:
    message = error(write_rows(tmp_path / "c.csv", header, [["t"] * len(header)]))
    assert "cannot tell which columns to use" in message
    assert str(header) in message
    assert "`columns: [...]`" in message


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_only_text_columns_are_taken_in_order(tmp_path: Path, suffix: str) -> None:
    year = "1999" if suffix == ".csv" else 1999
    path = write_rows(tmp_path / f"c{suffix}", ["first", "second", "year"], [["a", "b", year]])
    assert "['first', 'second', 'year']" in error(path)
    rows, _ = read_training_rows(path, columns=["second", "first"])
    assert rows == [TrainRow("b", "a", ())]


def test_a_label_beside_a_pair_needs_where_or_columns(tmp_path: Path) -> None:
    header = ["premise", "hypothesis", "label"]
    path = write_rows(tmp_path / "n.tsv", header, [["a", "b", "0"], ["c", "d", "2"]])
    message = error(path)
    assert "'label'" in message
    assert "where" in message
    assert "columns" in message
    assert read_training_rows(path, where={"label": "0"})[0] == [TrainRow("a", "b", ())]
    assert len(read_training_rows(path, columns=["premise", "hypothesis"])[0]) == 2


def test_explicit_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "c.csv")
    rows, report = read_training_rows(path, columns=["source", "negative", "anchor", "positive"])
    assert rows[0] == TrainRow("x", "n zero", ("a zero", "p zero"))
    assert report.columns["negatives"] == ["anchor", "positive"]
    same, _ = read_training_rows(path, columns=["anchor", "anchor"])
    assert same[0] == TrainRow("a zero", "a zero", ())
    message = error(path, columns=["anchor", "positve"])
    assert "'positve'" in message
    assert str(HEADER) in message
    assert "named twice" in error(path, columns=["anchor", "positive", "anchor"])
    assert "must be a list" in error(path, columns=["anchor"])
    assert "must be a list" in error(path, columns="anchor")


def test_each_positive_of_a_list_makes_its_own_row(tmp_path: Path) -> None:
    for positive, negative in [("pos", "neg"), ("positives", "negatives")]:
        objects = [{"query": "q", positive: ["p", "r"], negative: ["n", "", "m"]}]
        objects.append({"query": "s", positive: "t", negative: ["u"]})
        rows, report = read_training_rows(write(tmp_path / "l.jsonl", jsonl(*objects)))
        assert rows == [
            TrainRow("q", "p", ("n", "m")),
            TrainRow("q", "r", ("n", "m")),
            TrainRow("s", "t", ("u",)),
        ]
        assert report.num_read == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lists_of_passages(tmp_path: Path, suffix: str) -> None:
    header = ["query_id", "query", "positive_passages", "negative_passages"]
    cells = ["1", "q", [{"docid": "7", "text": "p"}], [{"docid": "8", "text": " n "}]]
    rows, _ = read_training_rows(write_rows(tmp_path / f"t{suffix}", header, [cells]))
    assert rows == [TrainRow("q", "p", ("n",))]


def test_a_key_may_first_stand_in_the_last_line(tmp_path: Path) -> None:
    first = {"anchor": "a", "positive": "p", "negative_1": "n"}
    text = jsonl(first, {**first, "negative_2": "m"})
    rows, _ = read_training_rows(write(tmp_path / "k.jsonl", text))
    assert [row.negatives for row in rows] == [("n",), ("n", "m")]


def test_where(tmp_path: Path) -> None:
    header = ["anchor", "positive", "kind", "fold"]
    cells: list[list[Any]] = [
        ["a", "p", "x", 1],
        ["b", "q", "y", 1],
        ["c", "r", "x", 2],
        ["", "", "z", 3],
    ]
    path = write_rows(tmp_path / "w.parquet", header, cells)
    rows, report = read_training_rows(path, where={"kind": "x", "fold": "1"})
    assert rows == [TrainRow("a", "p", ())]
    assert report.num_read == 1
    # The row left out is not looked at, so that its empty text is no error.
    assert len(read_training_rows(path, where={"kind": "x"})[0]) == 2
    assert "no usable row" in error(path, where={"kind": "nothing"})
    message = error(path, where={"lang": "en"})
    assert "'lang'" in message
    assert str(header) in message


# --- bad rows -------------------------------------------------------------------------------

GOOD = {"anchor": "a", "positive": "p", "negative": "n"}


@pytest.mark.parametrize(
    ("line", "column", "reason"),
    [
        ({**GOOD, "anchor": ""}, "anchor", "empty text"),
        ({**GOOD, "positive": " \n\t "}, "positive", "empty text"),
        ({**GOOD, "positive": None}, "positive", "text missing"),
        ({"anchor": "a", "negative": "n"}, "positive", "text missing"),
        ({**GOOD, "anchor": 5}, "anchor", "wrong type: got int 5"),
        ({**GOOD, "anchor": ["a"]}, "anchor", "wrong type: got list"),
        ({**GOOD, "positive": []}, "positive", "text missing"),
        ({**GOOD, "positive": ["p", ""]}, "positive", "empty text"),
        ({**GOOD, "positive": [{"title": "t"}]}, "positive", "text missing"),
        ({**GOOD, "negative": ""}, "negative", "empty text"),
        ({**GOOD, "negative": None}, "negative", "text missing"),
        ({"anchor": "a", "positive": "p"}, "negative", "text missing"),
        ({**GOOD, "negative": []}, "negative", "no negative"),
        ({**GOOD, "negative": ["", None]}, "negative", "no negative"),
        ({**GOOD, "negative": ["n", 5]}, "negative", "wrong type"),
        ('{"anchor": "a", "positive": "p", "anchor": "b"}', "anchor", "duplicate key"),
        ('{"anchor": "a", "positive": "p"', None, "not a JSON object"),
        ('{"anchor": "a", "positive": "\\ud800", "negative": "n"}', None, "not a JSON object"),
        ('["a", "p"]', None, "not a JSON object"),
        ("a text", None, "not a JSON object"),
        ("[" * 200_000, None, "not a JSON object"),
    ],
)
def test_bad_json_rows(tmp_path: Path, line: Any, column: str | None, reason: str) -> None:
    bad = line + "\n" if isinstance(line, str) else jsonl(line)
    path = write(tmp_path / "b.jsonl", jsonl(GOOD) + "\n" + bad + jsonl(GOOD))
    message = error(path)
    place = "b.jsonl, line 3" + (f", column {column!r}" if column else "")
    assert f"{place}: {reason}" in message
    assert "fix the row or set `on_bad_row: skip`" in message
    rows, report = read_training_rows(path, on_bad_row="skip")
    assert rows == [TrainRow("a", "p", ("n",))] * 2
    assert report.num_read == 3
    (kind,) = report.skipped
    assert reason.startswith(kind.split(",")[0])
    assert column is None or repr(column) in kind
    assert report.skipped[kind] == 1


@pytest.mark.parametrize("name", ["b.csv", "b.tsv"])
@pytest.mark.parametrize("cells", [["a"], ["a", "p", "n", "more"], ["a", "p"]])
def test_the_wrong_number_of_cells(tmp_path: Path, name: str, cells: list[str]) -> None:
    mark = "," if name == "b.csv" else "\t"
    lines = [["anchor", "positive", "negative"], ["a", "p", "n"], cells, ["b", "q", "m"]]
    path = write(tmp_path / name, "\n".join(mark.join(line) for line in lines))
    assert f"{name}, line 3: wrong number of cells: got {len(cells)}, wanted 3" in error(path)
    rows, report = read_training_rows(path, on_bad_row="skip")
    assert [row.anchor for row in rows] == ["a", "b"]
    assert report.skipped == Counter({"wrong number of cells": 1})


def test_broken_csv_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "b.csv", 'anchor,positive\n"a"b,p\nc,q\n')
    assert "b.csv, line 2: not valid CSV" in error(path)
    rows, report = read_training_rows(path, on_bad_row="skip")
    assert rows == [TrainRow("c", "q", ())]
    assert report.skipped == Counter({"not valid CSV": 1})
    # An open quote swallows the rows after it, so skipping "one" row would lose them silently.
    path = write(tmp_path / "b.csv", 'anchor,positive\na,p\n"b,q\nc,r\nd,s\n')
    assert "b.csv, line 3: the row from here to line 5" in error(path, on_bad_row="skip")
    path = write(tmp_path / "b.csv", '"anchor"x,positive\na,p\n')
    assert "b.csv, line 1: the header is not valid CSV" in error(path)


def test_several_negatives_may_be_empty_but_not_all(tmp_path: Path) -> None:
    header = ["anchor", "positive", "negative_1", "negative_2"]
    cells = [["a", "p", "n", ""], ["b", "q", "", "m"], ["c", "r", "n", "m"], ["d", "s", " ", ""]]
    path = write_rows(tmp_path / "n.tsv", header, cells)
    assert "n.tsv, line 5, column 'negative_1': no negative" in error(path)
    rows, report = read_training_rows(path, on_bad_row="skip")
    assert [row.negatives for row in rows] == [("n",), ("m",), ("n", "m")]
    assert sum(report.skipped.values()) == 1


def test_rows_of_parquet_are_counted_from_one(tmp_path: Path) -> None:
    cells: list[list[Any]] = [[f"a{i}", f"p{i}"] for i in range(5000)]
    cells[4500][1] = None
    path = write_rows(tmp_path / "r.parquet", ["anchor", "positive"], cells)
    assert "r.parquet, row 4501, column 'positive': text missing" in error(path)
    rows, report = read_training_rows(path, on_bad_row="skip")
    assert len(rows) == 4999
    assert rows[-1] == TrainRow("a4999", "p4999", ())
    assert report.skipped == Counter({"text missing, column 'positive'": 1})


def test_no_usable_row(tmp_path: Path) -> None:
    path = write(tmp_path / "z.tsv", "anchor\tpositive\n\tp\n\tq\nr\t\n")
    message = error(path, on_bad_row="skip")
    assert "all 3 rows are bad" in message
    assert "\"empty text, column 'anchor'\": 2" in message
    assert "no usable row" in error(write(tmp_path / "h.csv", "anchor,positive\n"))
    message = error(write(tmp_path / "j.jsonl", "\nnull\n[]\n"), on_bad_row="skip")
    assert "j.jsonl, line 2: not a JSON object" in message


# --- limit ----------------------------------------------------------------------------------


def test_limit_draws_a_reproducible_sample_in_file_order(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "l.tsv", ["anchor", "positive"], [[f"{i:03}", "p"] for i in range(200)]
    )

    def sample(limit: int, seed: int = 0) -> list[str]:
        rows, report = read_training_rows(path, limit=limit, seed=seed)
        assert report.num_read == 200
        return [row.anchor for row in rows]

    drawn = sample(50)
    assert len(set(drawn)) == 50
    assert drawn == sorted(drawn)
    assert drawn == sample(50)
    assert drawn != sample(50, seed=1)
    assert drawn != [f"{i:03}" for i in range(50)]
    assert len(sample(200)) == len(sample(1000)) == 200
    # Over many seeds each row is drawn about equally often.
    times = Counter(name for seed in range(300) for name in sample(20, seed))
    assert len(times) == 200
    assert 10 <= min(times.values()) <= max(times.values()) <= 55
    # One of two rows shows a bias best.
    two = write_rows(tmp_path / "two.tsv", ["anchor", "positive"], [["a", "p"], ["b", "p"]])
    first = sum(read_training_rows(two, limit=1, seed=s)[0][0].anchor == "a" for s in range(400))
    assert 150 < first < 250


def test_limit_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "l.tsv", ["anchor", "positive"], [[f"{i}", "p"] for i in range(99)]
    )
    code = (
        "import sys; from lowmem_cft.data.rows import read_training_rows as read;"
        f"print([row.anchor for row in read({path!r}, limit=9)[0]]);"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    expected = [row.anchor for row in read_training_rows(path, limit=9)[0]]
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        # Reading a text file must not pay for the import of the heavy libraries either.
        assert done.stdout.splitlines() == [str(expected), "[]"]


def test_options_without_meaning(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "o.tsv")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        read_training_rows(path, limit=0)
    with pytest.raises(ValueError, match="on_bad_row must be"):
        read_training_rows(path, on_bad_row="ignore")  # type: ignore[arg-type]


# --- scored pairs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "used",
    [
        ["sentence1", "sentence2", "score"],
        ["Sentence1", "Sentence2", "Label"],
        ["text1", "text2", "similarity_score"],
        ["s1", "s2", "score"],
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz", ".jsonl", ".parquet"])
def test_scored_pairs(tmp_path: Path, used: list[str], suffix: str) -> None:
    header = ["id", *used]
    path = write_rows(
        tmp_path / f"s{suffix}", header, [["1", "a", "b", "2.5"], ["2", "c", "d", " 0 "]]
    )
    pairs, report = read_scored_pairs(path)
    assert pairs == [ScoredPair("a", "b", 2.5), ScoredPair("c", "d", 0.0)]
    assert report.columns == dict(zip(["sentence1", "sentence2", "score"], used, strict=True))


def test_scored_pairs_options(tmp_path: Path, hub: list[tuple[Any, ...]]) -> None:
    header = ["x", "y", "gold", "part"]
    cells = [[f"x{i}", f"y{i}", i, "ab"[i % 2]] for i in range(10)]
    path = write_rows(tmp_path / "s.jsonl", header, cells)
    message = error(path, read_scored_pairs)
    assert str(header) in message
    assert message.endswith("rename those to use to sentence1, sentence2 and score")
    twice = write(tmp_path / "t.tsv", "score\tScore\na\tb\n")
    assert "`columns" not in error(twice, read_scored_pairs)
    columns = ["y", "x", "gold"]
    pairs, report = read_scored_pairs(path, columns=columns, where={"part": "b"}, limit=3, seed=4)
    assert len(pairs) == 3
    assert report.num_read == 5
    assert all(pair.score % 2 == 1 for pair in pairs)
    assert all(pair.sentence1 == f"y{pair.score:.0f}" for pair in pairs)
    assert "must be a list" in error(path, read_scored_pairs, columns=["x", "y"])
    assert "named twice" in error(path, read_scored_pairs, columns=["x", "x", "gold"])
    with pytest.raises(DataError, match="cannot tell"):
        read_scored_pairs("owner/name")
    assert hub == [("owner/name", None, "test")]


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        ("", "str ''"),
        ("high", "str 'high'"),
        ("nan", "str 'nan'"),
        ("-inf", "str '-inf'"),
        ("1_5", "str '1_5'"),
        (None, "NoneType None"),
        (True, "bool True"),
        ([1], "list [1]"),
        (10**400, "int 1000"),
    ],
)
def test_bad_scores(tmp_path: Path, score: Any, shown: str) -> None:
    good = {"sentence1": "a", "sentence2": "b", "score": -1}
    path = write(tmp_path / "s.jsonl", jsonl(good, {**good, "score": score}))
    message = error(path, read_scored_pairs)
    assert f"s.jsonl, line 2, column 'score': bad score: got {shown}" in message
    assert message.endswith("; fix the row or remove it")
    pairs, report = read_scored_pairs(path, on_bad_row="skip")
    assert pairs == [ScoredPair("a", "b", -1.0)]
    assert report.skipped == Counter({"bad score, column 'score'": 1})


def test_bad_sentences(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tsv", "sentence1\tsentence2\tscore\na\tb\t1\nc\t \t2\n")
    assert "s.tsv, line 3, column 'sentence2': empty text" in error(path, read_scored_pairs)
