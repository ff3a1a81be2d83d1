"""The process that makes a card small: it takes what it should, and ends when it should."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bench.gpu import ballast
from places import ROOT


@pytest.fixture
def child() -> Callable[[], psutil.Process]:
    """The process that was started since: those of other tests may still run."""
    others = set(psutil.Process().children())

    def started() -> psutil.Process:
        (process,) = set(psutil.Process().children()) - others
        return process

    return started


def test_the_ballast_is_gone_when_its_place_is_left(child: Callable[[], psutil.Process]) -> None:
    with ballast.ballast(cuda=False, leave_bytes=2**30) as held:
        assert held.held_bytes > 0
        process = child()
        assert process.cmdline()[-2:] == [str(2**30), "--cpu"]
    assert not process.is_running()


def test_the_ballast_does_not_outlive_a_killed_process(tmp_path: Path) -> None:
    script = tmp_path / "holder.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "import psutil\n"
        "from bench.gpu.ballast import ballast\n"
        "with ballast(cuda=False, leave_bytes=1):\n"
        "    print(psutil.Process().children()[0].pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = psutil.Process(int(holder.stdout.readline()))
    holder.kill()
    holder.wait()
    holder.stdout.close()
    child.wait(20)


def test_the_ballast_may_be_held_for_longer_than_it_may_take_to_start() -> None:
    with ballast.ballast(cuda=False, leave_bytes=1):
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert all(timer.finished.is_set() for timer in timers), "one waits to end the ballast"


def test_a_ballast_that_ended_early_spoils_what_was_measured(
    child: Callable[[], psutil.Process],
) -> None:
    def kill_it() -> None:
        process = child()
        process.kill()
        process.wait(20)

    with (
        pytest.raises(RuntimeError, match="ended early"),
        ballast.ballast(cuda=False, leave_bytes=1),
    ):
        kill_it()


def test_a_ballast_that_takes_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ballast.sys, "executable", "/bin/false")
    with (
        pytest.raises(RuntimeError, match="ended with 1"),
        ballast.ballast(cuda=False, leave_bytes=1),
    ):
        pass


def test_the_ballast_takes_what_is_to_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 100 blocks of which 90 are free, 40 of them in one piece."""
    free = [90]
    block = ballast._BLOCK

    def empty(size: int, **_: Any) -> torch.Tensor:
        if size > 40 * block:
            raise torch.OutOfMemoryError("CUDA out of memory")
        free[0] -= size // block
        return torch.zeros(1)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0] * block, 100 * block))
    ballast.take(12 * block + 5)
    assert free[0] == 13
