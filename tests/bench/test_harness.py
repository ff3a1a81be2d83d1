"""Processes of the benchmarks: what they had written, and that they end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import harness
from bench.harness import in_turn, replaced, run_fresh, run_limited
from places import ROOT


def test_what_a_killed_process_had_found_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[-1]).write_text(json.dumps({'ok': True, 'half': 1}))\n"
        "time.sleep(60)\n"
    )
    results = run_limited([str(script)], 1.0)
    assert results["half"] == 1
    assert "killed" in results["error"]
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


def test_each_side_goes_first_in_turn() -> None:
    rounds = [in_turn(("a", "b", "c"), index) for index in range(4)]
    assert rounds == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert in_turn([], 3) == []


def test_what_was_replaced_is_back_after_an_error() -> None:
    original = harness.median

    def fail() -> None:
        with replaced(harness, "median", len):
            assert harness.median is len
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert harness.median is original


def test_a_fresh_process_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no_such_module --some: its process ended with 1"):
        run_fresh("no_such_module", ["--some"])


def test_the_parent_of_measured_processes_stays_small() -> None:
    """A child's peak of resident memory starts at its parent's."""
    modules = ["bench.harness", "bench.step.__main__", "bench.train.__main__"]
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
