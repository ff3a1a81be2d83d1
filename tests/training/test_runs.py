"""A run's folder is made, continued or replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.training.pipeline import run_recipe
from running import MakeRecipe, Silent, start


def test_resume_refuses_another_recipe_and_lists_all_that_differs(make_recipe: MakeRecipe) -> None:
    trainer = start(make_recipe(train={"steps": 2}))
    trainer.step()
    trainer.save()
    other = make_recipe(
        train={"steps": 2, "learning_rate": 0.5},
        lora={"rank": 2},
        data={"sources": [{"path": "other.jsonl"}]},
    )
    with pytest.raises(ValueError, match=r"`resume`: .* began with another recipe") as refused:
        start(other, resume=True)
    for text in (
        "data.sources.0.path was '",
        "lora.rank was 4 and is 2 now",
        "train.learning_rate was 0.01 and is 0.5 now",
    ):
        assert text in str(refused.value)
    assert "`new_rate`" not in str(refused.value)
    rate = make_recipe(train={"steps": 2, "learning_rate": 0.5})
    with pytest.raises(
        ValueError, match=r"learning_rate was .* \(another learning rate: `new_rate`\)"
    ):
        start(rate, resume=True)
    for sections in (
        {"memory": {"token_budget": 32}},
        {"train": {"steps": 2, "save_every": 1, "save_minutes": None}},
        {"loss": {"on_no_negatives": "warn"}},
        {"eval": {"sets": []}, "output": {"export": "none"}},
    ):
        start(make_recipe(**{"train": {"steps": 2}, **sections}), resume=True)


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


def test_a_longer_run_follows_its_own_schedule(make_recipe: MakeRecipe) -> None:
    """Resumed to 6 steps after 3 of 4, its last rates are those of a run of 6 steps."""

    def recipe(steps: int, **train: object) -> Recipe:
        return make_recipe(train={"steps": steps, "warmup_steps": 0, **train}, eval={"sets": []})

    trainer = start(recipe(4))
    rates = [trainer.step().learning_rate for _ in range(3)]
    trainer.save()
    assert rates == pytest.approx([0.01, 0.0075, 0.005])
    rising = r"learning rate of step 4 would rise from 0\.0025 to 0\.005 with 6 steps .*`new_rate`"
    with pytest.raises(ValueError, match=rising):
        start(recipe(6), resume=True)
    observer = Silent()
    longer = start(recipe(6), observer, resume=True, new_rate=True)
    assert "learning rate of step 4: 0.005, where 0.0025 was planned" in observer.said
    rates = [longer.step().learning_rate for _ in range(3)]
    assert rates == pytest.approx([0.005, 0.01 / 3, 0.005 / 3])
    anew = start(recipe(6, learning_rate=0.02), resume=True, new_rate=True)
    assert anew.step().learning_rate == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"has done 3 steps, and the recipe wants 2"):
        start(recipe(2), resume=True)


def test_the_folder_says_with_which_recipe_a_run_went_on(make_recipe: MakeRecipe) -> None:
    first = make_recipe(train={"steps": 1, "schedule": "constant", "warmup_steps": 0})
    folder, metrics = run_recipe(first, Silent())
    assert metrics.steps == 1
    longer = make_recipe(
        train={"steps": 2, "schedule": "constant", "warmup_steps": 0}, eval={"sets": []}
    )
    _, metrics = run_recipe(longer, Silent(), resume=True)
    assert metrics.steps == 2
    assert load_recipe(str(folder.recipe)) == longer


def test_another_rate_is_for_a_run_that_goes_on(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match="`new_rate` goes with `resume`"):
        run_recipe(make_recipe(), Silent(), new_rate=True)
