"""Rows as they are read: lists of texts, `where`, bad rows, samples and scored pairs."""

from __future__ import annotations

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
from row_files import error, jsonl, write, write_rows

# --- training rows ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl", ".parquet"])
def test_rows_with_no_one_and_many_negatives_mix(tmp_path: Path, suffix: str) -> None:
    header = ["anchor", "positive", "negative_1", "negative_2"]
    cells = [["a", "p", "n", ""], ["b", "q", "", "m"], ["c", "r", "n", "m"], ["d", "s", " ", ""]]
    rows, report = read_training_rows(write_rows(tmp_path / f"n{suffix}", header, cells))
    assert [row.negatives for row in rows] == [("n",), ("m",), ("n", "m"), ()]
    assert not report.skipped


@pytest.mark.parametrize(
    "negative",
    [{}, {"negative": None}, {"negative": ""}, {"negative": []}, {"negative": ["", None]}],
)
def test_a_row_without_a_negative_has_none(tmp_path: Path, negative: dict[str, Any]) -> None:
    lines = [
        {"anchor": "a", "positive": "p", "negative": "n"},
        {"anchor": "b", "positive": "q", **negative},
    ]
    path = write(tmp_path / "r.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert [row.negatives for row in read_training_rows(path)[0]] == [("n",), ()]


@pytest.mark.parametrize(
    ("value", "kept"),
    [(True, "b"), (False, "a"), (1, "b"), (0, "a"), ("1", "b"), ("0", "a")],
)
@pytest.mark.parametrize("cells", [["0", "1"], [0, 1]], ids=["texts", "numbers"])
def test_where_takes_numbers_and_truth_values(
    tmp_path: Path, value: str | bool | int, kept: str, cells: list[Any]
) -> None:
    lines = [
        {"anchor": n, "positive": "p", "is_duplicate": c} for n, c in zip("ab", cells, strict=True)
    ]
    path = write(tmp_path / "w.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    rows, _ = read_training_rows(path, where={"is_duplicate": value})
    assert [row.anchor for row in rows] == [kept]


@pytest.mark.parametrize("value", [True, "True"])
def test_where_takes_truth_values_of_json(tmp_path: Path, value: str | bool) -> None:
    lines = [
        {"anchor": n, "positive": "p", "same": same} for n, same in (("a", False), ("b", True))
    ]
    path = write(tmp_path / "w.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert [row.anchor for row in read_training_rows(path, where={"same": value})[0]] == ["b"]


def test_a_passage_begins_with_its_title(tmp_path: Path) -> None:
    line = {
        "query": "where is the bridge",
        "positive_passages": [{"docid": "7", "title": " Old Bridge", "text": "It crosses it. "}],
        "negative_passages": [{"title": "", "text": "No."}, {"title": None, "text": "It opens."}],
    }
    path = write(tmp_path / "t.jsonl", json.dumps(line) + "\n")
    (row,) = read_training_rows(path)[0]
    assert row == TrainRow("where is the bridge", "Old Bridge It crosses it.", ("No.", "It opens."))


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
    assert message.endswith("name those of sentence1, sentence2 and score with `columns: [...]`")
    twice = write(tmp_path / "t.tsv", "score\tScore\na\tb\n")
    assert "differ only in upper and lower case" in error(twice, read_scored_pairs)
    columns = ["y", "x", "gold"]
    pairs, report = read_scored_pairs(path, columns=columns, where={"part": "b"}, limit=3, seed=4)
    assert len(pairs) == 3
    assert report.num_read == 5
    assert all(pair.score % 2 == 1 for pair in pairs)
    assert all(pair.sentence1 == f"y{pair.score:.0f}" for pair in pairs)
    assert "must be a list" in error(path, read_scored_pairs, columns=["x", "y"])
    assert "named twice" in error(path, read_scored_pairs, columns=["x", "x", "gold"])
    with pytest.raises(DataError, match="wanted two sentences and their score"):
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


def test_where_that_keeps_nothing_lists_what_there_is(tmp_path: Path) -> None:
    rows = [{"anchor": "a", "positive": "p", "kind": i, "split": "dev"} for i in range(9)]
    path = write(tmp_path / "w.jsonl", jsonl(*rows))
    message = error(path, where={"kind": 77, "split": "dev"})
    assert (
        "`where: {'kind': 77, 'split': 'dev'}` keeps none; there are kind 0, 1, 2, 3, 4, ..."
        in (message)
    )
    message = error(path, where={"kind": 77, "split": "test"})
    assert message.endswith("there are kind 0, 1, 2, 3, 4, ..., split 'dev'")
