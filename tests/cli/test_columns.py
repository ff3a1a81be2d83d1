"""Scored pairs whose columns nobody can tell: a proposal at a terminal, an option elsewhere."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from lowmem_cft.cli.columns import with_columns_named
from running import MEAN, Run

LINES = "A man, sitting\tAnother one\t3.2\nA dog\tA cat\t1.5\nIt rains\tIt is raining\t4.8\n"


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.tsv"
    file.write_text(LINES, encoding="utf-8")
    return str(file)


def answer(monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    """Somebody sits at a terminal and types this."""
    stream = io.StringIO(typed)
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", stream)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


@pytest.mark.parametrize("typed", ["\n", "y\n"])
def test_a_proposal_is_taken(
    typed: str, pairs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, typed)
    named = with_columns_named(["demo", pairs], lambda i, name: f"-s {name}")
    assert named == ["demo", f"{pairs}::1,2,3"]
    asked = capsys.readouterr().err
    assert "its first line is data, no header: ['A man, sitting', 'Another one', '3.2']" in asked
    assert "columns: sentence1 1, sentence2 2, score 3? [Y/n]" in asked


def test_a_proposal_is_not_taken(pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "n\n")
    with pytest.raises(ValueError, match=r"in this order: -s .*::SENTENCE1,SENTENCE2,SCORE$"):
        with_columns_named([pairs], lambda i, name: f"-s {name}")


def test_what_eval_advises_works(command: Run, tiny_folder: Path, pairs: str) -> None:
    code, _, err = command("eval", str(tiny_folder), *MEAN, "-s", pairs)
    assert code == 2
    _, advised = err.strip().rsplit(" -s ", 1)
    assert advised == f"{pairs}::1,2,3"
    code, out, err = command("eval", str(tiny_folder), *MEAN, "-s", advised)
    assert code == 0, err
    assert " 3 │" in out


def test_what_train_advises_works(command: Run, recipe_file: Path, pairs: str) -> None:
    given = ["train", str(recipe_file), "--set", f"eval.sets=[{pairs}]"]
    code, _, err = command(*given)
    assert code == 2
    _, advised = err.strip().rsplit(" --set ", 1)
    assert advised == f"eval.sets.0={pairs}::1,2,3"
    code, _, err = command(*given, "--set", advised)
    assert code == 0, err
    assert "::1,2,3 " in err
