"""A recipe put together: plan, optimizer, mistakes that are found before weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lowmem_cft.data.rows import TrainRow
from lowmem_cft.planning.recipe_plan import planner_for, shape_of
from lowmem_cft.training import job
from lowmem_cft.training.job import assemble
from running import MakeRecipe, Silent, start


def test_a_text_that_never_fits_stops_before_weights_are_loaded(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_backbone", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=r"texts of up to \d+ tokens.*what helps"):
        start(make_recipe(memory={"limit": "750MiB"}))


def test_the_last_plan_is_taken_again_where_it_fits(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    planners = []

    def spied(*arguments: Any) -> Any:
        planners.append(planner_for(*arguments))
        return planners[-1]

    monkeypatch.setattr(job, "planner_for", spied)
    made = make_recipe()
    roomy = assemble(made, Silent())
    last = replace(roomy.plan, backward_tokens=32, forward_tokens=32)
    assert assemble(made, Silent(), last_plan=last).plan == last != roomy.plan

    need = planners[0].predict(roomy.plan, shape_of(made, roomy.corpus)).peak_bytes
    monkeypatch.setattr(job, "run_limit", lambda *_: need - 1)
    chosen = assemble(made, Silent()).plan
    assert assemble(made, Silent(), last_plan=roomy.plan).plan == chosen != roomy.plan


def test_a_job_has_the_rows_it_is_given(make_recipe: MakeRecipe) -> None:
    rows = [TrainRow(f"a cat {i}", f"the dog {i}", (f"is {i}",)) for i in range(20)]
    observer = Silent()
    made = assemble(make_recipe(train={"logical_batch": 4}), observer, rows=rows)
    assert len(made.corpus.store) == 60
    assert "60 distinct texts, tokenised once" in observer.said
    texts = made.texts_of(3)
    assert texts.num_queries == 4
    assert len(texts.text_P) == 12
    assert not np.array_equal(made.texts_of(2).text_P, texts.text_P)
    assert np.array_equal(made.texts_of(3).text_P, texts.text_P), (
        "a step's texts are always the same"
    )


@pytest.mark.parametrize(("softmaxes", "both_ways"), [("one_way", False), ("symmetric", True)])
def test_a_step_knows_what_the_loss_compares(
    softmaxes: str, both_ways: bool, make_recipe: MakeRecipe
) -> None:
    rows = [TrainRow(f"a cat {i // 2}", f"the dog {i}", ()) for i in range(8)]
    section = {"softmaxes": softmaxes}
    made = assemble(make_recipe(loss=section, train={"logical_batch": 8}), Silent(), rows=rows)
    keys = made.texts_of(0).positive_key_MK
    assert (keys is not None) == both_ways
    assert keys is None or keys.shape == (8, 3)  # its own, its anchor, and the other positive
