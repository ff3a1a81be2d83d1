"""Every source of rows, where it is looked for, and how its lines are read and counted."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lowmem_cft.data.columns import DataError
from lowmem_cft.data.rows import TrainRow, read_training_rows
from row_files import CELLS, HEADER, ROWS, error, jsonl, write, write_rows


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
    data_set = datasets.Dataset.from_list(objects).select([2, 0])
    data_set.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict(train=data_set, dev=datasets.Dataset.from_list(objects[1:2]))
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
    assert ".jsonl, .json-lines, .json, .csv, .tsv, .parquet" in message


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
    wanted = "not gzip-compressed" if name.endswith(".gz") else "not a readable Parquet file"
    assert wanted in error(str(path), on_bad_row="skip")


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


def test_a_key_may_first_stand_in_the_last_line(tmp_path: Path) -> None:
    first = {"anchor": "a", "positive": "p", "negative_1": "n"}
    text = jsonl(first, {**first, "negative_2": "m"})
    rows, _ = read_training_rows(write(tmp_path / "k.jsonl", text))
    assert [row.negatives for row in rows] == [("n",), ("n", "m")]


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
        ({**GOOD, "positive": [{"title": "t"}]}, "positive", "wrong type: got dict {'title': 't'}"),
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


def test_rows_of_parquet_are_counted_from_one(tmp_path: Path) -> None:
    cells: list[list[Any]] = [[f"a{i}", f"p{i}"] for i in range(5000)]
    cells[4500][1] = None
    path = write_rows(tmp_path / "r.parquet", ["anchor", "positive"], cells)
    assert "r.parquet, row 4501, column 'positive': text missing" in error(path)
    rows, report = read_training_rows(path, on_bad_row="skip")
    assert len(rows) == 4999
    assert rows[-1] == TrainRow("a4999", "p4999", ())
    assert report.skipped == Counter({"text missing, column 'positive'": 1})


TEXTS = [
    ["plain words", "a, comma"],
    ['she said "yes"', 'he said "no"'],
    ['"all of it"', 'a 6" pipe'],
    ["tab\there", "two\nlines"],
    ["  spaces ", "caf\u00e9 \U0001f600"],
]


def written(path: Path, quoting: int, delimiter: str, rows: list[list[str]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerow(["anchor", "positive"])
        writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("rows", [TEXTS, TEXTS[1:2], TEXTS[2:3], TEXTS[3:4]])
@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_the_same_texts_in_every_format(
    tmp_path: Path, quoting: int, rows: list[list[str]], suffix: str, mark: str
) -> None:
    """Whatever csv.writer quotes: in all of its styles, as in JSON lines and in an array."""
    expected = [TrainRow(a.strip(), p.strip(), ()) for a, p in rows]
    objects = [{"anchor": a, "positive": p} for a, p in rows]
    (tmp_path / "t.json").write_text(json.dumps(objects, indent=1))
    (tmp_path / "t.jsonl").write_text(jsonl(*objects))
    paths = [written(tmp_path / f"t.{suffix}", quoting, mark, rows)]
    for path in [*paths, tmp_path / "t.json", tmp_path / "t.jsonl"]:
        assert read_training_rows(str(path))[0] == expected, path


@pytest.mark.parametrize(
    "line",
    [
        'she said "yes"\the nodded',
        '"Yes," she said.\the nodded',
        'a 6" pipe\ta pipe',
        '"one cell quoted"\tthe other is not',
        '"unpaired\tp',
        '""\tp',
    ],
)
def test_quotes_that_are_text_stay(tmp_path: Path, line: str) -> None:
    """Files of tab-separated texts without any quoting, as the STS sets are."""
    path = write(tmp_path / "raw.tsv", f"anchor\tpositive\n{line}\na\tb\n")
    rows, _ = read_training_rows(path)
    anchor, positive = line.split("\t")
    assert rows == [TrainRow(anchor, positive, ()), TrainRow("a", "b", ())]


def test_lists_written_as_text(tmp_path: Path) -> None:
    text = 'query,pos,neg\nq,[\'p\'],"[\'n\', \'m\']"\nr,"[""it\'s""]",[]\n'
    path = write(tmp_path / "l.csv", text)
    rows, _ = read_training_rows(path)
    assert rows == [TrainRow("q", "p", ("n", "m")), TrainRow("r", "it's", ())]
    many = "query,pos\n" + "q,['p']\n" * 200 + "q,no list\n"
    message = error(write(tmp_path / "m.csv", many))
    assert "line 202, column 'pos': no list: got str 'no list' where others are lists" in message
    mixed = write(tmp_path / "n.csv", "query,pos\nq,[1] a note\nr,plain\n")
    assert read_training_rows(mixed)[0][0].positive == "[1] a note"


def test_json_arrays(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([GOOD, {**GOOD, "anchor": 5}, GOOD]))
    assert "a.json, row 2, column 'anchor': wrong type" in error(path)
    assert len(read_training_rows(path, on_bad_row="skip")[0]) == 2
    lines = write(tmp_path / "l.json", jsonl(GOOD, GOOD))
    assert len(read_training_rows(lines)[0]) == 2
    assert "not a JSON array" in error(write(tmp_path / "b.json", "[{"))
    assert "row 1: not a JSON object" in error(write(tmp_path / "c.json", '["a text"]'))


def test_long_cells(tmp_path: Path) -> None:
    long = "word " * 100_000
    path = written(tmp_path / "long.csv", csv.QUOTE_ALL, ",", [["a", long]])
    assert len(read_training_rows(path)[0][0].positive) == len(long) - 1


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_delimiters_of_a_csv_without_a_header(mark: str, tmp_path: Path) -> None:
    """Excel's semicolons, and commas within texts, which need no quotes then."""
    first = '"a, b"' if mark == "," else "a, b"
    lines = [mark.join(cells) + "\n" for cells in ([first, "c", "3"], ["d", '"e; f"', "4"])]
    path = write(tmp_path / "p.csv", "".join(lines))
    rows, _ = read_training_rows(path, columns=["1", "2"])
    assert rows == [TrainRow("a, b", "c", ()), TrainRow("d", "e; f", ())]


LINES = "anchor\tpositive\na\tp\nb\tq\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", LINES.encode("utf-16"), "it is UTF-16, as Excel's Unicode Text is; save it as"),
        ("a.csv", LINES.encode("utf-16-le"), "line 1: it has NUL bytes, as UTF-16 has; save the"),
        ("a.tsv", LINES.replace("\n", "\r").encode(), "its lines end in carriage returns alone"),
        ("a.jsonl", gzip.compress(b"{}"), "it is gzip-compressed; let its name end in .gz"),
        ("a.csv", b"PAR1 and so on", "it is a Parquet file; let its name end in .parquet"),
        ("a.xlsx", b"PK\x03\x04 and so on", "it is a zip archive, as Excel's .xlsx is; unpack it"),
    ],
)
def test_files_of_another_kind_than_their_name_says(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    assert f"{file}" in error(str(file))
    assert message in error(str(file))


def test_windows_line_ends_and_marks(tmp_path: Path) -> None:
    wanted = [TrainRow("a", "p", ()), TrainRow("b", "q", ())]
    for name, text in (("w.tsv", LINES), ("w.csv", LINES.replace("\t", ","))):
        file = tmp_path / name
        file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert read_training_rows(str(file))[0] == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.json",
            '{"data": [{"anchor": "a"}]}',
            "got one JSON object with the keys ['data'], wan",
        ),
        ("a.json", '{\n"anchor": "a",\n"positive": "p"}', "with the keys ['anchor', 'positive']"),
        ("a.json", "[]", "the file is empty; wanted JSON objects, one a row"),
        ("a.jsonl", '["a", "p"]\n', 'wanted objects such as {"anchor": "...", "positive": "..."}'),
        ("a.jsonl", '{"anchor": "a", "anchor": "b"}\n', "line 1, column 'anchor': duplicate key"),
    ],
)
def test_json_that_is_no_rows(name: str, text: str, message: str, tmp_path: Path) -> None:
    assert message in error(write(tmp_path / name, text))


def test_one_object_on_one_line_is_a_row(tmp_path: Path) -> None:
    rows, _ = read_training_rows(write(tmp_path / "a.json", '{"query": "q", "pos": ["p"]}'))
    assert rows == [TrainRow("q", "p", ())]
