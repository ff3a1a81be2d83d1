"""What the report says of a run as a whole: its share, its stages, its scores by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fabricated import (
    Fabricated,
    read_text,
    row_of,
    whole_cft,
)
from lowmem_cft.papers.report import plots as reproduce_plots
from lowmem_cft.papers.request import PAPERS


def test_what_share_it_is(phi: Fabricated) -> None:
    first = read_text(phi).split("\n\n")[1]
    assert "Training: 50 of 4,593 (1.1 %) of one epoch's optimizer steps, done." in first
    assert "An ablation: 50 of 500 (10 %)" in first
    assert "27,560 of 275,601 (10 %) rows" in first
    assert "at most 500 rows of a split" in first
    assert "2 h and 12GiB of memory" in first
    assert "Done: 12 of the paper's 14 stages" in first


@pytest.mark.parametrize("paper", ["cft", "prompteol"])
def test_nothing_run_yet(tmp_path: Path, paper: str) -> None:
    model = "minicpm-2b" if paper == "cft" else "opt-1.3b"
    made = Fabricated(tmp_path / "run", paper, model)
    text, values = made.report()
    assert "None was run yet." in text
    assert "Done: 0 of the paper's" in text
    steps = "one epoch's" if paper == "cft" else "the published"
    assert f"300 of 4,593 (6.5 %) of {steps} optimizer steps, planned" in text
    assert values["not_run"] == PAPERS[paper].own_stages(None)
    assert len(values["not_run"]) == (14 if paper == "cft" else 8)
    assert sorted(path.name for path in (made.folder / "report").iterdir()) == [
        "report.json",
        "report.md",
    ]


def test_any_one_stage_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce_plots, "draw", lambda report, out: [])  # for time
    made = whole_cft(tmp_path / "run")
    stages = sorted((made.folder / "stages").glob("*.json"))
    assert len(stages) == 14
    for path in stages:
        hidden = path.rename(path.with_suffix(".hidden"))
        text, values = made.report()
        assert path.stem in [*values["not_run"], *values["beyond_not_run"]]
        assert path.stem in text.split("## What was not done")[1]
        hidden.rename(path)


def test_scores_by_step(phi: Fabricated) -> None:
    text = read_text(phi)
    part = text[text.index("## Data efficiency") :]
    header = next(line for line in part.splitlines() if line.startswith("| step"))
    assert header.count("(batch 60)") == 5
    assert row_of(part, "0")[1:] == ["30.00"] * 5
    assert row_of(part, "50")[1:] == ["55.00"] * 5


def test_many_steps_are_thinned_in_the_table_only(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.train("train")
    path = made.folder / "stages" / "train.json"
    values = json.loads(path.read_text())
    values["result"]["curve"]["points"] = [[step, step / 1000] for step in range(101)]
    path.write_text(json.dumps(values))
    text, values = made.report()
    assert "Every 5th step that was scored" in text
    assert row_of(text, "100")[1] == "10.00"
    assert row_of(text, "5")[1] == "0.50"
    assert "\n| 4 |" not in text
    assert len(values["trainings"]["train"]["curve"]["points"]) == 101
