"""A run is exported when it is finished, and over nothing but an export of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowmem_cft.exporting.finished import check_target, export_run
from lowmem_cft.inference.loading import RECORD
from running import Silent


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
