"""A run's log and metrics: written as they were read, whichever version wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.records import (
    ExportRecord,
    StepLine,
    append_line,
    read_lines,
    read_metrics,
    truncate_log,
)
from made_runs import made_metrics


def test_what_was_not_set_is_not_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    append_line(run, StepLine(step=1, loss=2.0, mean_negative=None))
    assert json.loads(run.log.read_text()) == {"step": 1, "loss": 2.0, "mean_negative": None}
    made_metrics().write(run)
    written = json.loads(run.metrics.read_text())
    assert not {"export", "temperature", "best_step"} & written.keys()
    assert written["rows_per_s"] is None
    assert written["plan"] == StepPlan(backward_tokens=64, forward_tokens=128).to_json()
    assert read_metrics(run) == made_metrics()


def test_an_exports_record_is_part_of_the_metrics(tmp_path: Path) -> None:
    record = ExportRecord(kind="adapter", checked=False)
    metrics = made_metrics().model_copy(update={"export": record})
    metrics.write(RunFolder(tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text())["export"] == {
        "kind": "adapter",
        "checked": False,
    }
    assert read_metrics(RunFolder(tmp_path)).export == record


def test_other_versions_records_are_read_and_kept(tmp_path: Path) -> None:
    """An older one has fewer keys; what a newer one wrote beside them is written again."""
    run = RunFolder(tmp_path)
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "novelty": [1]}]
    run.log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert [line.step for line in read_lines(run)] == [1, 2]
    truncate_log(run, 2)
    assert [json.loads(line) for line in run.log.read_text().splitlines()] == lines
    truncate_log(run, 1)
    assert [json.loads(line) for line in run.log.read_text().splitlines()] == lines[:1]


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_metrics_that_are_none_say_so(text: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.metrics.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.json: .*finish the run"):
        read_metrics(run)
