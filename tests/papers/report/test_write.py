"""The report of a reproduction, from fabricated records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fabricated import (
    Fabricated,
    read_text,
    row_of,
)
from lowmem_cft.papers.report.plots import NAMES, SETS
from lowmem_cft.papers.report.write import share_of, write_report


def test_circumstances_and_stages(phi: Fabricated) -> None:
    text = read_text(phi)
    for fact in ("A made-up chip", "torch 9.9", "--model phi-2 --hours 2", "2026-01-02 03:00 to"):
        assert fact in text
    assert "In all 0.23 hours." in text
    cells = row_of(text, "data", "## Stages")
    assert cells[1:3] == ["what data is", "60"]
    assert cells[5] == f"`{2:064d}`"
    assert row_of(text, "some.csv")[1:] == ["27,560", f"`{'a' * 64}`"]
    assert "/somewhere" not in text + (phi.folder / "report" / "report.json").read_text()
    assert "- Stages not run: ablation-lr-5e-3, evaluate-ablation-lr-5e-3." in text
    assert "- Beyond the paper, and not run either: icl-search." in text
    assert "- Trained on other data." in text


def test_training_data_seen_in_evaluation_are_said(phi: Fabricated) -> None:
    assert "70,001 distinct texts, of which 12 stand word for word" in phi.report()[0]
    path = phi.folder / "stages" / "data.json"
    record = json.loads(path.read_text("utf-8"))
    record["result"]["sources"][0] |= {"path": "someone/rows", "sha256": None}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert row_of(phi.report()[0], "someone/rows")[1:] == ["27,560", "-"]


def test_written_again_it_is_the_same(phi: Fabricated) -> None:
    before = {path: path.read_bytes() for path in sorted((phi.folder / "report").iterdir())}
    write_report(phi.folder)
    assert {path: path.read_bytes() for path in (phi.folder / "report").iterdir()} == before
    assert {path.name for path in before} == {"report.md", "report.json", *NAMES}


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of an earlier report go: they are not of these records."""
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.evaluate("base", 0.8)
    made.report()
    assert (made.folder / "report" / SETS).exists()
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert [path.name for path in write_report(made.folder)] == ["report.md", "report.json"]
    text = read_text(made)
    assert "pip install '.[plots]'" in text
    assert ".png" not in text
    assert not (made.folder / "report" / SETS).exists()


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (300, 4593, "300 of 4,593 (6.5 %)"),
        (50, 500, "50 of 500 (10 %)"),
        (4592, 4593, "4,592 of 4,593 (99.9 %)"),
        (500, 500, "500 of 500 (100 %)"),
        (1, 4593, "1 of 4,593 (0.022 %)"),
        (1000, 500, "1,000 of 500 (200 %)"),
    ],
)
def test_share(part: int, whole: int, text: str) -> None:
    assert share_of(part, whole) == text
