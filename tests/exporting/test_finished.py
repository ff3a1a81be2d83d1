"""A run is exported when it is finished, and over nothing but an export of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem_cft.exporting import finished
from lowmem_cft.exporting.finished import check_target, export_run
from lowmem_cft.model.exported import RECORD
from lowmem_cft.training import pipeline
from running import MakeRecipe, Silent


def test_only_an_export_of_ours_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    check_target(target)
    target.mkdir()
    check_target(target)
    (target / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is no export of ours; choose another folder"):
        check_target(target)
    (target / RECORD).write_text("{}")
    check_target(target, overwrite=True)
    with pytest.raises(ValueError, match="holds an export already: replace it with `overwrite`"):
        check_target(target)
    with pytest.raises(ValueError, match="is no export of ours"):
        check_target(target / "letter.txt")


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    with pytest.raises(ValueError, match=r"is no run folder \(no recipe.yaml in it\)"):
        export_run(run, target, "merged", torch.device("cpu"), Silent())
    (run / "recipe.yaml").write_text("data: {sources: [{path: demo}]}\n")
    with pytest.raises(ValueError, match="without a final adapter"):
        export_run(run, target, "merged", torch.device("cpu"), Silent())
    assert not target.exists()


def test_a_failed_export_leaves_what_was_there(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = pipeline.run_recipe(make_recipe(train={"steps": 1}), Silent())
    record = folder.model / RECORD
    before, names = record.stat().st_mtime_ns, sorted(folder.path.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the exported model does not embed")

    monkeypatch.setattr(finished, "checked", fail)
    for target in (folder.model, folder.path / "other"):
        with pytest.raises(RuntimeError, match="does not embed"):
            export_run(
                folder.path, target, "adapter", torch.device("cpu"), Silent(), overwrite=True
            )
    assert record.stat().st_mtime_ns == before
    assert sorted(folder.path.iterdir()) == names
