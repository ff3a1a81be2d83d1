"""A run's own scores."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lowmem_cft.evaluation.sts import score as evaluate
from lowmem_cft.training import pipeline
from lowmem_cft.training.records import read_lines
from running import MakeRecipe, Silent, start


def test_best_adapter_is_kept(make_recipe: MakeRecipe) -> None:
    made = make_recipe(
        train={"steps": 8, "learning_rate": 0.1}, eval={"every": 2, "keep_best": True}
    )
    folder, metrics = pipeline.run_recipe(made, Silent())
    scored = {line.step: line.spearman for line in read_lines(folder) if line.spearman is not None}
    assert list(scored) == [2, 4, 6, 8]
    assert len(set(scored.values())) > 1
    assert metrics.best_step == max(scored, key=lambda step: scored[step])
    assert metrics.after[0].spearman == pytest.approx(max(scored.values()), abs=1e-12)


def test_a_score_that_cannot_be_computed_loses_no_step(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_recipe(train={"steps": 4}, eval={"every": 2})
    trainer, real = start(made), evaluate.embed_texts

    def overflows(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs) * (np.nan if trainer.step_index == 2 else 1)

    with monkeypatch.context() as broken:
        broken.setattr(evaluate, "embed_texts", overflows)
        with pytest.raises(ValueError, match="embeddings are not finite"):
            trainer.train()
    assert [line.step for line in read_lines(trainer.folder)] == [1, 2]
    resumed = start(made, resume=True)
    assert resumed.step_index == 2
    resumed.train()
    assert [line.step for line in read_lines(trainer.folder)] == [1, 2, 3, 4]


def test_resume_may_evaluate_other_sets(make_recipe: MakeRecipe) -> None:
    """Scores from before training are of the base, also for a set that is added later."""
    none = make_recipe(train={"steps": 3}, eval={"sets": []})
    pipeline.run_recipe(none, Silent())
    wanted, _ = pipeline.run_recipe(
        make_recipe(train={"steps": 3}, output={"name": "other"}), Silent()
    )
    _, metrics = pipeline.run_recipe(make_recipe(train={"steps": 3}), Silent(), resume=True)
    other = json.loads(wanted.metrics.read_text())
    assert metrics.to_json()["before"] == other["before"]
    assert metrics.to_json()["after"] == other["after"]
    assert metrics.before != metrics.after
