"""The stages of the papers: what each changes and depends on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reproducing import Ask, records_of
from running import Heard


def test_data_that_changed_are_noticed(ask: Ask, tmp_path: Path) -> None:
    ask(stages=["data"]).run(Heard())
    rows = tmp_path / "data" / "rows.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").replace("cat", "dog"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.json: done with other inputs.*`redo` data"):
        ask(stages=["data"]).run(Heard())


def test_missing_training_data_stop_before_all_work(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paper = ("data.sources=[{path: nli_for_simcse.csv}]",)
    run, heard = ask(overrides=paper), Heard()
    missing = rf"nli_for_simcse\.csv is not in {re.escape(str(tmp_path))}; download it from https"
    with pytest.raises(ValueError, match=missing):
        run.run(heard)
    assert [text for text in heard.said if text.startswith("[")] == [
        "[1/14] data: what is trained on"
    ]
    ask().run(Heard())  # what it advises: other rows, in the same folder
    assert "data" in records_of(ask())
    assert ask().missing_data() is None


def test_a_first_paper_run_can_do_the_second_ones_stages(ask: Ask) -> None:
    run = ask(stages=["icl-search", "transfer-base"])
    run.run(Heard())
    records = records_of(run)
    assert set(records) == {"icl-search", "transfer-base"}
    assert "in one word" in records["icl-search"]["result"]["template"]
