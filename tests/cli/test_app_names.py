"""A name that is not there is told before torch or transformers is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_HEAVY = ("torch", "transformers", "datasets", "peft")

_RUN = f"""
import sys
from lowmem_cft.cli.app import main
try:
    main()
finally:
    print([name for name in {_HEAVY} if name in sys.modules])
"""


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "dmeo"], "did you mean demo?"),
        (["train", "demo", "--set", "model.id=./nope"], "model.id: ./nope does not exist"),
        (["train", "demo", "--set", "data.sources.0.path=rows.jsonl"], "nearest in .: rosw.jsonl"),
        (["train", "demo", "--set", "eval.sets=[STS71]"], "did you mean STS17?"),
        (["train", "demo", "--set", "train.setps=3"], "--set train.setps=3: unknown key"),
        (["plan", "demo", "--set", "model.id=nope.gguf"], "nope.gguf does not exist"),
        (["eval", "runs/mien", "--suite", "sts"], "nearest in runs: mine"),
        (["eval", "demo", "-s", "STSBenchmark-dve"], "did you mean STSBenchmark-dev?"),
        (["export", "runs/mien"], "nearest in runs: mine"),
        (["export", "."], "no run folder"),
        (["embed", "runs/mien", "rosw.jsonl"], "nearest in runs: mine"),
        (["icl-search", "runs/mien"], "nearest in runs: mine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_names_come_first(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.yaml").touch()
    (tmp_path / "rosw.jsonl").write_text("a text\n")
    code, out, err = run(tmp_path, *arguments)
    assert code == 2, err
    assert said in err
    assert out == "[]"


def test_what_this_test_looks_at_is_loaded_otherwise(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "plan", "demo", "--memory", "12")
    assert code == 2
    assert "got '12' without a unit, wanted one, such as 12GiB" in err
    assert "torch" in out
