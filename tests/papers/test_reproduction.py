"""Runs of papers in a folder: what may change there, and what may not."""

from __future__ import annotations

import pytest

from reproducing import Ask
from running import Heard


def test_another_request_needs_another_folder(ask: Ask) -> None:
    ask(stages=["data"]).run(Heard())
    with pytest.raises(ValueError, match=r"begun with transfer_rows = None, now it is 30.*`out`"):
        ask(stages=["data"], transfer_rows=30)


def test_anew_means_from_the_beginning(ask: Ask) -> None:
    stages = ["data", "train", "icl-search"]
    run = ask(stages=stages)
    run.run(Heard())
    runs, trials = run.folder / "runs" / "train", run.folder / "icl" / "trials.jsonl"
    before = [path.stat().st_mtime_ns for path in (runs / "log.jsonl", trials)]
    heard = Heard()
    ask(stages=stages).run(heard, redo=["train", "icl-search"])
    after = [path.stat().st_mtime_ns for path in (runs / "log.jsonl", trials)]
    assert all(late > early for early, late in zip(before, after, strict=True))
    assert not any("going on after" in text or " are in " in text for text in heard.said)
    assert (run.folder / "runs" / "train.old").is_dir()
    with pytest.raises(ValueError, match=r"`redo`: got 'trian', wanted one of data, train"):
        ask(stages=stages).run(Heard(), redo=["trian"])


def test_memory_may_change_in_a_folder(ask: Ask) -> None:
    ask(stages=["data"], budget="8GiB").run(Heard())
    heard = Heard()
    ask(stages=["data"], budget="4GiB").run(heard)
    assert heard.said[0].endswith("done before")


def test_a_damaged_file_of_the_request_is_named(ask: Ask) -> None:
    run = ask(stages=["data"])
    run.run(Heard())
    (run.folder / "reproduction.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"reproduction\.json: no record of a reproduction"):
        ask(stages=["data"])
