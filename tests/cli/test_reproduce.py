"""The command that repeats a paper's run: what it shows before any work, and what it refuses."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lowmem_cft.cli.reproduce import stage_table
from lowmem_cft.papers.reproduction import Estimate
from lowmem_cft.papers.results import Transfer
from lowmem_cft.papers.stages import Effort, Stage
from running import Run


def test_the_table_has_whole_names_and_numbers_in_80_columns() -> None:
    name, what = "evaluate-ablation-no-hard-negatives", "without hard negatives, 500 steps"
    stage = Stage(name, "evaluate", what, dict, lambda observer: Transfer(tasks=[]))
    effort = Effort(1_718_012e12, round(13.2 * 2**30))
    estimates = [Estimate(stage, effort, 2862.67, done) for done in (True, False)]
    console = Console(file=io.StringIO(), width=80)
    console.print(stage_table(estimates))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    row = rf"│ {name} +│ 1,718,012 │ +2862\.67 │ 13\.2 │ (done|    ) │"
    assert len(re.findall(row, shown)) == 2
    assert shown.count(f"│   {what} ") == 2
    assert re.search(r"│ left +│ 1,718,012 │ +2862\.67 │ 13\.2 │ +│", shown)


def test_dry_run_without_data(
    command: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOWMEM_CFT_DATA", raising=False)
    out = tmp_path / "out"
    arguments = ["reproduce", "prompteol", "--model", "opt-125m", "--dry-run", "--offline"]
    code, printed, said = command(*arguments, "--out", str(out), "--budget", "12GiB")
    assert code == 0, said
    for name in ("icl-search", "transfer-trained", "TFLOP"):
        assert name in printed
    assert "1,077 of the paper's 1,077 training steps" in said
    assert "missing: nli_for_simcse.csv is not in" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cft", "--model", "opt-125m"], "cft has gemma-2b"),
        (["simcse", "--model", "opt-125m"], "wanted one of cft, prompteol"),
        (["cft", "--model", "smollm2-135m", "--stage", "trian"], "wanted one of data, base"),
        (["cft", "--model", "smollm2-135m", "--hours", "-1"], "wanted more than 0"),
        (["cft", "--model", "smollm2-135m", "--budget", "much"], "limit: got 'much'"),
    ],
)
def test_mistakes(command: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "out"
    code, _, said = command("reproduce", *arguments, "--offline", "--dry-run", "--out", str(out))
    assert code == 2
    assert message in " ".join(said.split())
