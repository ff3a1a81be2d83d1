"""The model card."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lowmem_cft.training.card import model_card
from made_runs import made_metrics
from running import MakeRecipe


@pytest.mark.parametrize("hub_base", [True, False])
def test_the_card_says_what_was_trained_and_how_it_scores(
    make_recipe: MakeRecipe, hub_base: bool
) -> None:
    recipe = make_recipe(loss={"temperature": 0.03})
    text = model_card(
        recipe, made_metrics(rows_per_s=5.25), Path("runs/tiny/model"), hub_base=hub_base
    )
    data = ModelCard(text).data
    assert data.library_name == "sentence-transformers"
    assert data.base_model == (recipe.model.id if hub_base else None)
    assert "dataset_size:8" in data.tags
    assert 'SentenceTransformer("runs/tiny/model")' in text
    assert "| a | 3 | 50.00 | 50.00 |" in text
    assert "temperature 0.03, hard negatives" in text
    assert "5.2 rows per second" in text


def test_the_card_says_where_a_learned_temperature_ended(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(loss={"learn_temperature": True})
    metrics = made_metrics(rows_per_s=5.0, temperature=0.0312)
    text = model_card(recipe, metrics, Path("model"), hub_base=False)
    assert "temperature 0.05 at first and 0.0312 in the end (learned)" in text
