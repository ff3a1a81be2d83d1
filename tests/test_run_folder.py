"""A run's folder gives way to the one it replaces, or takes its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A new run, and the old one that waits aside."""
    run = RunFolder(tmp_path / "mine")
    run.path.mkdir()
    run.recipe.write_text("new")
    run.replaced.mkdir()
    (run.replaced / "recipe.yaml").write_text("old")
    return run


def test_all_lies_in_the_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "mine")
    places = (run.recipe, run.log, run.checkpoint, run.best, run.adapter, run.metrics, run.model)
    assert len({place.name for place in places}) == len(places)
    assert {place.parent for place in places} == {run.path}
    assert run.replaced.parent == tmp_path


def test_a_run_that_began_lets_the_old_one_go(run: RunFolder) -> None:
    run.begun()
    assert not run.replaced.exists()
    assert run.recipe.read_text() == "new"


def test_a_run_that_came_to_nothing_gives_way_to_the_old_one(run: RunFolder) -> None:
    run.withdraw()
    assert run.recipe.read_text() == "old"
    assert not run.replaced.exists()


def test_a_run_that_wrote_something_stays(run: RunFolder) -> None:
    run.log.write_text("a line")
    run.withdraw()
    assert run.recipe.read_text() == "new"
    assert run.replaced.exists()
