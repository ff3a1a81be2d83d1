"""Which columns are taken: by their names, by their order, and when nobody can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowmem_cft.data.columns import UnclearColumns
from lowmem_cft.data.rows import ScoredPair, TrainRow, read_scored_pairs, read_training_rows
from row_files import HEADER, error, write_rows


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


HEADLESS = [["A man, sitting", "one", "3"], ["a dog", "a cat", "1.5"], ["rain", "rain", "5"]]


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".tsv.gz"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["score last", "score first"])
def test_pairs_without_a_header(suffix: str, order: tuple[int, ...], tmp_path: Path) -> None:
    first, *others = [[row[place] for place in order] for row in HEADLESS]
    path = write_rows(tmp_path / f"p{suffix}", first, others)
    message = error(path, read_scored_pairs)
    assert f"its first line is data, no header: {first}" in message
    assert "with `columns: [...]`, by number" in message
    columns = [str(1 + order.index(place)) for place in range(3)]
    pairs, report = read_scored_pairs(path, columns=columns)
    assert pairs == [ScoredPair(a, b, float(score)) for a, b, score in HEADLESS]
    assert list(report.columns.values()) == columns


def test_rows_without_a_header(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.csv", ["1", "a zero", "p zero"], [["2", "a one", "p one"]])
    assert "its first line is data, no header: ['1', 'a zero', 'p zero']" in error(path)
    rows, _ = read_training_rows(path, columns=["2", "3"], where={"1": 2})
    assert rows == [TrainRow("a one", "p one", ())]
    assert "no column '4'" in error(path, columns=["2", "4"])


@pytest.mark.parametrize(
    ("header", "row"),
    [
        (["0", "1", "2"], ["a", "b", "3"]),  # as pandas numbers columns
        (["sentence1", "sentence2", "5"], ["a", "b", "3"]),
        (["first", "second", "third"], ["a", "b", "3"]),
    ],
)
def test_a_header_is_no_row(header: list[str], row: list[str], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.csv", header, [row])
    assert str(header) in error(path, read_scored_pairs)
    pairs, _ = read_scored_pairs(path, columns=header)
    assert pairs == [ScoredPair("a", "b", 3.0)]


def test_what_columns_probably_are(tmp_path: Path) -> None:
    def likely(header: list[str], row: list[Any]) -> Any:
        with pytest.raises(UnclearColumns) as caught:
            read_scored_pairs(write_rows(tmp_path / "p.jsonl", header, [row]))
        return caught.value.columns

    assert likely(["id", "rating", "first", "second"], [1, 2, "a", "b"]) == [
        "first", "second", "rating",
    ]  # fmt: skip
    assert likely(["a", "b", "c", "rating"], ["a", "b", "c", 3]) is None


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("third", ["high", True, [3]])
def test_pairs_without_a_score(suffix: str, third: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"p{suffix}", ["a", "b", "c"], [["x", "y", third]])
    wanted = "got the columns ['a', 'b', 'c'], of which none holds numbers alone, wanted two"
    assert wanted in error(path, read_scored_pairs)
    path = write_rows(tmp_path / f"two{suffix}", ["a", "c"], [["x", 3]])
    assert "got the columns ['a', 'c'], wanted two sentences" in error(path, read_scored_pairs)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("score", [3, 0.5])
def test_numbers_are_scores(suffix: str, score: float, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"p{suffix}", ["a", "b", "c"], [["x", "y", score]])
    with pytest.raises(UnclearColumns) as caught:
        read_scored_pairs(path)
    assert caught.value.columns == ["a", "b", "c"]


def test_one_column_of_texts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.csv", ["only"], [["a"], ["b"]])
    message = error(path)
    assert "got one column of texts, 'only', wanted an anchor and a positive" in message
    assert "`columns: [only, only]`" in message
    rows, _ = read_training_rows(path, columns=["only", "only"])
    assert rows == [TrainRow("a", "a", ()), TrainRow("b", "b", ())]


def test_scored_pairs_are_not_trained_on_unasked(tmp_path: Path) -> None:
    header, cells = ["sentence1", "sentence2", "score"], [["a", "b", "5"], ["c", "d", "0"]]
    path = write_rows(tmp_path / "p.csv", header, cells)
    assert "these are scored pairs" in error(path)
    rows, _ = read_training_rows(path, columns=["sentence1", "sentence2"], where={"score": 5})
    assert rows == [TrainRow("a", "b", ())]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_first_line_of_sentences_is_not_taken_for_names(suffix: str, tmp_path: Path) -> None:
    rows = [["what is it like there", "a house"], ["who ran", "the cat"]]
    path = write_rows(tmp_path / f"c{suffix}", rows[0], rows[1:])
    message = error(path)
    assert "its first line looks like a row" in message
    assert "`columns: [1, 2]`" in message
    read, _ = read_training_rows(path, columns=["1", "2"])
    assert read == [TrainRow(*row) for row in rows]
