"""Files that commit 46ff87c wrote are read, gone on with and reported by the program of today.

fixtures/old/make.py says how they were made. Numbers are those that stand in the old files.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from places import ROOT

OLD = ROOT / "tests" / "fixtures" / "old"
STS_REPORT = "eval-sts-demo-pairs-65769de99f01.json"
TRANSFER_REPORT = "eval-transfer-partial-MRPC-limit-200.json"
REQUEST = (
    *("reproduce", "cft", "--model", "smollm2-135m", "--out", "paper", "--offline"),
    *("--demonstrations", "shown.tsv"),
    *("--set", "model.id=tiny", "--set", "model.quantization=none", "--set", "model.dtype=fp32"),
    *("--set", "data.sources=[{path: rows.jsonl}]", "--set", "train.logical_batch=16"),
    *("--set", "train.learning_rate=5e-3", "--set", "memory.token_budget=256"),
)

Run = Callable[..., str]


def _app() -> Any:
    from lowmem_cft.cli.app import app

    return app


def _write_report(folder: Path) -> list[Path]:
    from lowmem_cft.papers.report.write import write_report

    return write_report(folder)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a copy of the old folder; give all that it said."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")

    def command(*arguments: str, refused: bool = False) -> str:
        outcome = CliRunner().invoke(_app(), list(arguments), env={"COLUMNS": "200"})
        if refused:
            assert isinstance(outcome.exception, ValueError), outcome.output
            return str(outcome.exception)
        assert outcome.exit_code == 0, (outcome.output, outcome.exception)
        return outcome.output

    return command


def _json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _log(name: str) -> list[dict[str, Any]]:
    lines = Path(f"trained/{name}/log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- a training run ---------------------------------------------------------------------------


def test_a_finished_run_scores_as_it_did(run: Run) -> None:
    wanted = _json(f"trained/whole/{STS_REPORT}")
    assert wanted["sets"][0]["spearman"] == pytest.approx(-0.18673641537252386, abs=1e-15)
    sets = ("-s", "demo", "-s", "pairs.tsv", "--offline")
    run("eval", "trained/whole", *sets, "--out", "now.json")
    found = _json("now.json")
    assert list(found) == list(wanted)
    for name in ("suite", "protocol", "protocol_name", "complete", "bootstrap"):
        assert found[name] == wanted[name]
    assert found["mean"] == pytest.approx(wanted["mean"], abs=1e-5)
    for one, before in zip(found["sets"], wanted["sets"], strict=True):
        assert list(one) == list(before)
        for name in ("name", "num_pairs", "version", "pairs_sha256", "own_text"):
            assert one[name] == before[name]
        assert one["spearman"] == pytest.approx(before["spearman"], abs=1e-5)
        assert one["interval"] == pytest.approx(before["interval"], abs=1e-5)
    after = _json("trained/whole/metrics.json")["after"]
    assert [one["spearman"] for one in after] == [one["spearman"] for one in wanted["sets"]]


def test_an_evaluation_takes_the_old_ones_place(run: Run) -> None:
    report = Path("trained/whole") / STS_REPORT
    before = report.stat().st_mtime_ns
    files = sorted(path.name for path in Path("trained/whole").iterdir())
    run("eval", "trained/whole", "-s", "demo", "-s", "pairs.tsv", "--offline")
    assert sorted(path.name for path in Path("trained/whole").iterdir()) == files
    assert report.stat().st_mtime_ns != before
    run("compare", "trained/whole", str(OLD / "trained" / "whole"), "--out", "compared.json")
    assert _json("compared.json")["mean"]["difference"] == pytest.approx(0, abs=1e-5)


def test_run_and_export_embed_alike(run: Run) -> None:
    run("embed", "trained/whole", "texts.txt", "--out", "run.npy")
    run("embed", "trained/whole/model", "texts.txt", "--out", "model.npy")
    run("embed", "tiny", "texts.txt", "--out", "base.npy")
    ours, exported, base = (np.load(f"{name}.npy") for name in ("run", "model", "base"))
    assert ours.shape == (12, 16)
    assert np.allclose(ours, exported, atol=1e-6)
    assert not np.allclose(ours, base, atol=1e-2)


def test_a_run_is_exported_anew(run: Run) -> None:
    old = _json("trained/whole/model/lowmem_cft.json")
    adapter = Path("trained/whole/model/adapter_model.safetensors").read_bytes()
    files = {path.name for path in Path("trained/whole/model").rglob("*")}
    run("export", "trained/whole", "--overwrite")  # over the old one, which is known as ours
    found = _json("trained/whole/model/lowmem_cft.json")
    assert (list(found), found["kind"]) == ([*old, "special_tokens"], "adapter")
    assert Path("trained/whole/model/adapter_model.safetensors").read_bytes() == adapter
    assert {path.name for path in Path("trained/whole/model").rglob("*")} >= files


def test_a_stopped_run_goes_on_as_it_would_have(run: Run) -> None:
    whole, stopped = _log("whole"), _log("stopped")
    assert [line["step"] for line in stopped] == [1, 2, 3, 4]
    assert whole[5]["loss"] == pytest.approx(3.1976065635681152, abs=1e-15)
    assert [line["loss"] for line in stopped] == [line["loss"] for line in whole[:4]]
    said = run("train", "trained/stopped/recipe.yaml", "--resume", "--offline")
    assert "going on after step 4" in said
    lines = _log("stopped")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[:4] == stopped
    for now, then in zip(lines[4:], whole[4:], strict=True):
        assert set(then) <= set(now)
        for name in ("loss", "gradient_norm", "temperature", "learning_rate", "mean_rank"):
            assert now[name] == pytest.approx(then[name], rel=1e-4), name
    found, wanted = (_json(f"trained/{name}/metrics.json") for name in ("stopped", "whole"))
    assert set(wanted) <= set(found)
    assert found["before"] == wanted["before"]
    assert (found["steps"], found["best_step"]) == (wanted["steps"], wanted["best_step"]) == (6, 6)
    for now, then in zip(found["after"], wanted["after"], strict=True):
        assert now["spearman"] == pytest.approx(then["spearman"], abs=1e-4)
    assert found["export"]["kind"] == "adapter"


def test_a_resumed_run_must_be_the_same(run: Run) -> None:
    arguments = ["train", "trained/stopped/recipe.yaml", "--resume", "--offline"]
    said = run(*arguments, "--set", "train.seed=43", refused=True)
    assert "train.seed was 42 and is 43 now" in said


# --- reports ----------------------------------------------------------------------------------


def test_old_sts_reports_compare_as_they_did(run: Run) -> None:
    wanted = _json("compared.json")
    assert wanted["mean"]["difference"] == pytest.approx(-0.06420578341166602, abs=1e-15)
    said = run("compare", "base.json", f"trained/whole/{STS_REPORT}", "--out", "now.json")
    found = _json("now.json")
    assert found == wanted
    assert "-6.42" in said
    run("compare", "base.json", "base.json", "--out", "same.json")
    same = _json("same.json")["mean"]
    assert same["difference"] == 0
    assert same["interval"] == {"low": 0.0, "high": 0.0}


def test_an_old_transfer_report_is_known_as_one(run: Run) -> None:
    report = f"trained/whole/{TRANSFER_REPORT}"
    said = run("compare", report, report, refused=True)
    assert said == f"{report}: a report of transfer tasks; only those of STS are compared"
    run("compare", "trained/whole", "trained/whole", "--out", "same.json")  # it is not in the way
    assert _json("same.json")["a"]["report"] == f"trained/whole/{STS_REPORT}"


def test_a_transfer_report_is_as_it_was(run: Run, data_folder: Path) -> None:
    report = f"trained/whole/{TRANSFER_REPORT}"
    wanted = _json(report)
    assert wanted["mean"] == 0.65
    arguments = ["--suite", "transfer", "-s", "MRPC", "--limit", "200", "--offline"]
    run("eval", "trained/whole", *arguments)
    found = _json(report)
    assert list(found) == list(wanted)
    (task,), (before,) = found["tasks"], wanted["tasks"]
    assert list(task) == list(before)
    for name in ("name", "protocol", "num_rows", "task_rows", "checksums"):
        assert task[name] == before[name]
    assert task["accuracy"] == pytest.approx(before["accuracy"], abs=2 / 200)
    assert task["embedding_length"] == pytest.approx(before["embedding_length"], abs=1e-4)


def test_an_old_search_is_gone_on_with(run: Run) -> None:
    _, *trials = Path("icl/trials.jsonl").read_text(encoding="utf-8").splitlines()
    best = json.loads(trials[3])
    assert (best["word"], best["spearman"]) == ("road", -0.03233822100760297)
    search = ["icl-search", "tiny", "-s", "pairs.tsv", "--set", "model.dtype=fp32"]
    search += ["--demonstrations", "shown.tsv", "--out", "icl", "--offline"]
    before = Path("icl/trials.jsonl").read_bytes()
    said = run(*search)
    assert "4 of 4 are in icl/trials.jsonl" in said
    assert "plain template is scored again" not in said
    assert Path("icl/trials.jsonl").read_bytes() == before
    rows = [line for line in said.splitlines() if re.match(r"^│ +1 ", line)]
    assert len(rows) == 1
    assert f"{100 * best['spearman']:.2f}" in rows[0]
    assert f"{best['sentence']} -> {best['word']}" in rows[0]


# --- a reproduction ---------------------------------------------------------------------------


def test_the_report_follows_from_old_records(run: Run) -> None:
    report = Path("paper/report")
    old_text = (report / "report.md").read_text(encoding="utf-8")
    wanted = _json("paper/report/report.json")
    shutil.rmtree(report)
    files = _write_report(Path("paper"))
    assert {"report.md", "report.json"} <= {path.name for path in files}
    assert _json("paper/report/report.json") == wanted
    table = [line for line in old_text.splitlines() if line.startswith("| ")]
    assert len(table) > 40
    text = (report / "report.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("| ")] == table
    row = next(line for line in table if line.startswith("| STS12 |"))
    assert "8.35 (-32.55 to 48.31) | 10.43 (-29.30 to 50.20) | +2.09" in row


def test_an_old_reproduction_is_known_by_its_request(run: Run) -> None:
    said = run(*REQUEST, "--dry-run")
    done = [line for line in said.splitlines() if re.match(r"^│ (data|base|train|evaluate) ", line)]
    assert len(done) == 4
    assert all("done" in line for line in done)
    said = run(*REQUEST, "--transfer-rows", "30", "--dry-run", refused=True)
    assert "paper was begun with transfer_rows = None, now it is 30; choose another `out`" in said
