"""Processes of the benchmarks: what they had written, and that they end."""

from __future__ import annotations

import time
from pathlib import Path

from bench.harness import run_limited


def test_what_a_killed_process_had_found_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[-1]).write_text(json.dumps({'ok': True, 'half': 1}))\n"
        "time.sleep(60)\n"
    )
    found = run_limited([str(script)], 1.0)
    assert found["half"] == 1
    assert "killed" in found["error"]
    script.write_text("raise SystemExit(3)")
    assert "ended with 3" in run_limited([str(script)], 30.0)["error"]


def test_a_killed_process_ends_with_those_that_it_started(tmp_path: Path) -> None:
    script, alive = tmp_path / "parent.py", tmp_path / "alive"
    loop = f"while :; do touch {alive}; sleep 0.1; done"
    script.write_text(f"import subprocess; subprocess.run(['sh', '-c', {loop!r}])")
    assert "killed" in run_limited([str(script)], 1.5)["error"]
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()
