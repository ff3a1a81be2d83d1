"""compute-sanitizer is asked, and ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from bench.gpu.options import Options
from bench.gpu.parts import loss_bounds


def test_the_sanitizer_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = Options(torch.device("cpu"), True, 2**30, 60.0)
    tool, child = tmp_path / "compute-sanitizer", tmp_path / "child.py"
    tool.write_text(
        "#!/bin/sh\n"
        '[ "$2" = memcheck ] || { echo "ERROR SUMMARY: 1 hazard"; exit 9; }\n'
        '[ "$5 $6" = "--report-api-errors no" ] || exit 8\n'
        'shift 6; exec "$@"\n'
    )
    tool.chmod(0o755)
    child.write_text("import os; assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'")
    monkeypatch.setattr(loss_bounds, "CHILD", [str(child)])
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    results = loss_bounds.check(options)
    assert results["compute_sanitizer"] == str(tool)
    assert results["alone"]["ok"]
    assert results["memcheck"]["ok"]
    assert results["racecheck"]["code"] == 9
    assert "1 hazard" in results["racecheck"]["output"]
    assert not results["ok"]


def test_a_sanitizer_that_refuses_the_device_is_as_good_as_absent(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\necho "========= Error: Device not supported. Please"\nexit 9\n')
    tool.chmod(0o755)
    results = loss_bounds.run_child([str(tool)], dict(os.environ), 10.0)
    assert results == {"ok": True, "skipped": "========= Error: Device not supported. Please"}


def test_a_sanitizer_that_takes_too_long_ends_with_its_child(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    script = f"echo begun; (while :; do touch {alive}; sleep 0.1; done) & wait"
    results = loss_bounds.run_child(["sh", "-c", script], dict(os.environ), 1.0)
    assert not results["ok"]
    assert "killed" in results["error"]
    assert "begun" in results["output"]
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()
