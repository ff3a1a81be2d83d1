"""Steps that teach nothing are warned of, and end a run."""

from __future__ import annotations

import pytest

from lowmem_cft.recipe.schema import LossSection
from lowmem_cft.training import pipeline
from lowmem_cft.training.checkpoint import load_state
from lowmem_cft.training.health import NegativesWatch
from lowmem_cft.training.records import Progress, StepLine, read_lines
from running import Heard, MakeRecipe, Silent, start

HIDES_ALL = {"false_negative_margin": 2.0}


def line(step: int, masked_share: float | None) -> StepLine:
    mean = None if masked_share == 1 else 0.3
    return StepLine(step=step, loss=0.0, masked_share=masked_share, mean_negative=mean)


def watch(**loss: object) -> tuple[NegativesWatch, Heard]:
    heard = Heard()
    return NegativesWatch(LossSection.model_validate(loss), heard, Progress()), heard


def test_it_warns_once_where_masks_hide_nearly_all() -> None:
    negatives, heard = watch(false_negative_margin=0.1)
    assert negatives.reason_to_stop(line(1, 0.949), 1.0) is None
    assert heard.said == []
    for step in (2, 3):
        assert negatives.reason_to_stop(line(step, 0.95), 1.0) is None
    (warning,) = heard.said
    assert "in step 2 masks hide 95.0% of the negatives" in warning
    assert "lower loss.false_negative_margin (it is 0.1" in warning


def test_hard_negatives_of_other_rows_are_not_counted_as_hidden() -> None:
    """One in 50 documents is visible without masks, and so it is with them."""
    negatives, heard = watch(hard_negatives="own")
    assert negatives.reason_to_stop(line(1, 0.98), 0.02) is None
    assert heard.said == []
    assert negatives.reason_to_stop(line(2, 0.9995), 0.02) is None
    assert "hide 97.5% of the negatives" in heard.said[0]


def test_three_steps_in_a_row_without_negatives_end_the_run() -> None:
    negatives, _ = watch(false_negative_margin=2.0)
    shares = (1.0, 1.0, 0.99, 1.0, 1.0, 1.0)
    reasons = [negatives.reason_to_stop(line(i, share), 1.0) for i, share in enumerate(shares)]
    assert reasons[:5] == [None] * 5
    assert reasons[5] is not None
    assert "no negative was left in 3 steps in a row, up to step 5" in reasons[5]


def test_the_recipe_may_have_it_go_on() -> None:
    negatives, _ = watch(on_no_negatives="warn")
    assert [negatives.reason_to_stop(line(i, 1.0), 1.0) for i in range(9)] == [None] * 9


def test_a_step_in_which_nothing_counts_says_nothing() -> None:
    negatives, heard = watch()
    assert [negatives.reason_to_stop(line(i, None), 1.0) for i in range(9)] == [None] * 9
    assert heard.said == []


def test_a_run_that_learns_nothing_stops_and_goes_on_when_told_to(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    made = make_recipe(loss=HIDES_ALL, train={"steps": 6}, output={"export": "none"})
    with pytest.raises(RuntimeError, match=r"no negative was left in 3 steps .*on_no_negatives"):
        pipeline.run_recipe(made, observer)
    assert [line.step for line in observer.lines] == [1, 2, 3]
    assert (
        sum(said.startswith("WARNING: in step 1 masks hide 100.0%") for said in observer.said) == 1
    )
    warned = make_recipe(
        loss={**HIDES_ALL, "on_no_negatives": "warn"}, train={"steps": 6}, output={"export": "none"}
    )
    folder, _ = pipeline.run_recipe(warned, Silent(), resume=True)
    assert len(read_lines(folder)) == 6
    assert load_state(folder).progress.steps_without_negatives == 6


def test_the_share_that_is_visible_without_masks(make_recipe: MakeRecipe) -> None:
    own = start(make_recipe(loss={"hard_negatives": "own"}))
    texts = own.job.texts_of(0)
    assert (texts.num_queries, len(texts.place_S)) == (16, 48)
    assert own.job.visible_share(texts) == 16 / 31, "15 positives and one negative of 31"
    own.step()
    other = start(make_recipe(), overwrite=True)
    assert other.job.visible_share(other.job.texts_of(0)) == 1
