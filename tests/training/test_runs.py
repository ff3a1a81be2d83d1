"""A run's folder is made, continued or replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from running import MakeRecipe, start


def test_resume_refuses_another_recipe(make_recipe: MakeRecipe) -> None:
    start(make_recipe(train={"steps": 2})).train()
    with pytest.raises(ValueError, match=r"train.learning_rate was 0.01 .* is 0.5 now"):
        start(make_recipe(train={"steps": 2, "learning_rate": 0.5}), resume=True)
    start(make_recipe(train={"steps": 2}, memory={"token_budget": 32}), resume=True)


def test_existing_run_is_refused(make_recipe: MakeRecipe) -> None:
    made = make_recipe(train={"steps": 1})
    start(made).train()
    with pytest.raises(ValueError, match=r"exists: go on with `resume`, replace .*`overwrite`"):
        start(made)


def test_overwrite_spares_a_folder_that_is_no_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    made = make_recipe()
    precious = tmp_path / "runs" / "tiny" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(ValueError, match="no run of ours"):
        start(made, overwrite=True)
    assert precious.read_text() == "years of work"


def test_nothing_to_resume(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        start(make_recipe(), resume=True)
