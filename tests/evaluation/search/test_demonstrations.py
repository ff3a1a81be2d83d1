"""Demonstrations: the format as coded, the shipped ones, and files that users bring."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowmem_cft.data.columns import DataError
from lowmem_cft.evaluation.clean_up import clean_up
from lowmem_cft.evaluation.search.demonstrations import (
    PROMPTEOL,
    SHIPPED,
    Demonstration,
    check_template,
    read_demonstrations,
)
from lowmem_cft.evaluation.sts.sets import load_set

JOCKEY = Demonstration("A jockey riding a horse.", "Equestrian")
TWO = [JOCKEY, Demonstration("relating to the teeth, and their care.", "Dental")]


def test_the_template_as_coded() -> None:
    assert PROMPTEOL == 'This sentence : "{text}" means in one word:"'
    assert JOCKEY.before(PROMPTEOL) == (
        'This sentence : "A jockey riding a horse." means in one word:"Equestrian".'
        'This sentence : "{text}" means in one word:"'
    )


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (
            "{text} in a word: '",
            "A jockey riding a horse. in a word: 'Equestrian'.{text} in a word: '",
        ),
        ("«{text}» : «", "«A jockey riding a horse.» : «Equestrian».«{text}» : «"),
        ("{text} means ", "A jockey riding a horse. means Equestrian.{text} means "),
    ],
)
def test_other_templates(template: str, wanted: str) -> None:
    check_template(template)
    assert JOCKEY.before(template) == wanted


@pytest.mark.parametrize("template", ["", "no slot", "{text} and {text}", "{texts}"])
def test_a_template_has_one_slot(template: str) -> None:
    with pytest.raises(ValueError, match=r"`template`: got .* wanted \{text\} in it exactly once"):
        check_template(template)


# --- the shipped ones -------------------------------------------------------------------------


def test_shipped() -> None:
    shipped = read_demonstrations(SHIPPED)
    assert len(shipped) == 72
    for parts in (
        [demonstration.sentence for demonstration in shipped],
        [demonstration.word for demonstration in shipped],
    ):
        assert len({part.lower() for part in parts}) == 72
    for demonstration in shipped:
        assert re.fullmatch(r"[A-Z][a-z]+", demonstration.word), demonstration
        assert demonstration.sentence.endswith("."), demonstration
        assert demonstration.sentence == clean_up(demonstration.sentence), demonstration
        assert re.fullmatch(r"[A-Za-z' ,.]+", demonstration.sentence), demonstration
        assert 4 <= len(demonstration.sentence.split()) <= 18, demonstration
        words = {word.strip(".,").lower() for word in demonstration.sentence.split()}
        assert demonstration.word.lower() not in words, f"{demonstration} gives its word away"
    sentences = [demonstration for demonstration in shipped if demonstration.sentence[0].isupper()]
    assert len(sentences) == 36, "half are sentences, half definitions"


def test_shipped_are_of_no_set(data_folder: Path) -> None:
    def plain(text: str) -> str:
        return re.sub(r"[^a-z ]", "", text.lower()).strip()

    shipped = {plain(demonstration.sentence) for demonstration in read_demonstrations(SHIPPED)}
    seen = 0
    for name in ("STSBenchmark-test", "STSBenchmark-dev", "SICK-R", "STS16"):
        try:
            pairs = load_set(name, data_folder, offline=True).pairs
        except ValueError:
            continue
        seen += len(pairs)
        texts = {plain(text) for pair in pairs for text in (pair.sentence1, pair.sentence2)}
        assert not shipped & texts
    if not seen:
        pytest.skip("none of the sets is here")


# --- users' files -----------------------------------------------------------------------------


def _write(path: Path, column: str) -> None:
    rows = [{column: demonstration.sentence, "word": demonstration.word} for demonstration in TWO]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    if path.suffix == ".csv":
        lines = [f"{column},word"] + [f'"{row[column]}",{row["word"]}' for row in rows]
    elif ".tsv" in path.name:
        lines = [f"{column}\tword"] + [f"{row[column]}\t{row['word']}" for row in rows]
    else:
        lines = [json.dumps(row) for row in rows]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("column", ["sentence", "definition", "text"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.tsv.gz", "a.parquet"])
def test_files(tmp_path: Path, name: str, column: str) -> None:
    _write(tmp_path / name, column)
    assert read_demonstrations(tmp_path / name) == TWO


def test_further_columns_and_blanks_around(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("source\tword\tsentence\nmine\t Equestrian \t  A jockey riding a horse.  \n")
    assert read_demonstrations(path) == [JOCKEY]


HEADER = "sentence\tword\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "A.\ta\nB.\ttwo words\n", "line 3: got 'two words', wanted one word"),
        (HEADER + "A.\ta\n\t b\n", "line 3: got '', wanted a text and a word"),
        (HEADER + "A.\t \n", "line 2: got ' ', wanted a text and a word"),
        (HEADER + "A.\ta\nB.\tb\nA.\ta\n", "line 4: the same as line 2; remove one"),
        (HEADER + "A {text}.\ta\n", "line 2: got 'A {text}.'; braces and line breaks"),
        (HEADER + "A.\ta\nB.\n", "line 3: wrong number of cells: got 1, wanted 2"),
        (HEADER, "no demonstrations; write a line of sentence and word"),
        ("", "the file is empty"),
        ("sentence\tanswer\nA.\ta\n", "columns are ['sentence', 'answer'], wanted word and one"),
        ("sentence\ttext\tword\nA.\tA.\ta\n", "wanted word and one of sentence, definition, text"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        read_demonstrations(path)
    assert str(path) in str(raised.value)


def test_other_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"sentence": "A.", "word": 3}\n')
    with pytest.raises(DataError, match=r"line 1: got 3, wanted a text and a word"):
        read_demonstrations(path)
    path.write_text('{"sentence": "A\\nB.", "word": "a"}\n')
    with pytest.raises(DataError, match=r"line 1: .*line breaks cannot stand in a template"):
        read_demonstrations(path)
    for wrong in (tmp_path / "gone.tsv", tmp_path):
        with pytest.raises(DataError, match="`demonstrations`: no such file"):
            read_demonstrations(wrong)
    (tmp_path / "a.txt").write_text("A.\n")
    with pytest.raises(DataError, match="unknown kind of file"):
        read_demonstrations(tmp_path / "a.txt")
