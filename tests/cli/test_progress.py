"""What the screen says while a run goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from lowmem_cft.cli.progress import Screen
from lowmem_cft.evaluation.sts.score import SetScore
from lowmem_cft.training.records import StepLine
from running import Run


def test_progress_says_how_the_batch_is_told_apart(command: Run, recipe_file: Path) -> None:
    code, _, err = command("train", str(recipe_file), "--set", "loss.learn_temperature=true")
    assert code == 0, err
    note = r"loss \d+\.\d{4}  accuracy \d+%  rank \d+\.\d(  hidden \d+%)?  temperature 0\.0\d{3}  [\d.]+ rows/s"
    assert re.search(rf"^step 2/2  {note}$", err, re.MULTILINE), err
    assert len(re.findall(r"^loss by the (\w+) path: ", err, re.MULTILINE)) == 1


def said_by(lines: list[StepLine], capsys: pytest.CaptureFixture[str]) -> list[str]:
    screen = Screen(Console(stderr=True, width=400))
    screen.begin(len(lines), 0)
    for line in lines:
        screen.step(line)
    return capsys.readouterr().err.splitlines()


def test_where_there_is_no_terminal_twenty_lines_say_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [StepLine(step=i + 1, loss=1 / (i + 1), rows_per_s=10.0) for i in range(100)]
    said = said_by(lines, capsys)
    assert len(said) == 20
    assert said[0] == "step 5/100  loss 0.2000  10.0 rows/s"
    assert said[-1].startswith("step 100/100")


def test_what_a_step_observed_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    line = StepLine(
        step=1,
        loss=0.5,
        accuracy=0.75,
        mean_rank=1.5,
        masked_share=0.961,
        temperature=0.0512,
        rows_per_s=1.0,
    )
    meaning, said, again = said_by([line, line.model_copy(update={"step": 2})], capsys)
    for word in ("accuracy", "rank", "hidden"):
        assert f"{word}, " in meaning
    assert again.startswith("step 2/2")
    assert said == (
        "step 1/2  loss 0.5000  accuracy 75%  rank 1.5  hidden 96%  temperature 0.0512  1.0 rows/s"
    )


def test_scores_are_told_after_their_step(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(Console(stderr=True, width=400))
    screen.scored(7, [SetScore("a", 0.5, 3, None, "a.tsv"), SetScore("b", -0.25, 3, None, "b.tsv")])
    screen.scored(8, [])
    assert capsys.readouterr().err == "Spearman x 100 after 7 steps: a 50.00, b -25.00\n"
