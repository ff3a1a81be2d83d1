"""By which recipe a model embeds, and what is an error of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.inference.loading import load_model, says_how_it_embeds
from lowmem_cft.model.exported import RECORD
from lowmem_cft.recipe.load import load_recipe

CPU = torch.device("cpu")
TEXTS = ["the cat sat", "a dog ran in the house"]


def load(name: Path, **options: Any) -> Any:
    return load_model(str(name), CPU, lambda text: None, **options)


def test_a_base_model_embeds_as_assignments_say(tiny_folder: Path) -> None:
    plain = load(tiny_folder, overrides=["model.dtype=fp32"])
    mean = load(tiny_folder, overrides=["model.dtype=fp32", "embedding.pooling=mean"])
    assert plain.backbone.dtype == torch.float32
    assert (plain.encoder.pooling, mean.encoder.pooling) == ("eos", "mean")
    assert np.abs(plain.embed(TEXTS) - mean.embed(TEXTS)).max() > 1e-2
    longer = load(tiny_folder, overrides=["model.dtype=fp32", "text.template='the man is {text}'"])
    assert longer.text_format.head == "the man is "
    assert np.abs(plain.embed(TEXTS) - longer.embed(TEXTS)).max() > 1e-2


def test_a_base_model_embeds_by_a_recipe_that_names_another(tiny_folder: Path) -> None:
    loaded = load(tiny_folder, recipe_name="cft-smollm2-135m", overrides=["model.dtype=fp32"])
    recipe = load_recipe("cft-smollm2-135m")
    assert loaded.recipe.model.id == str(tiny_folder)
    assert loaded.recipe.text == recipe.text
    assert loaded.recipe.embedding == recipe.embedding


@pytest.mark.parametrize("given", [{"recipe_name": "demo"}, {"overrides": ["text.max_tokens=9"]}])
@pytest.mark.parametrize("file", ["recipe.yaml", RECORD])
def test_a_folder_that_says_it_itself(tmp_path: Path, file: str, given: Any) -> None:
    assert not says_how_it_embeds(tmp_path)
    (tmp_path / file).write_text("{}")
    assert says_how_it_embeds(tmp_path)
    with pytest.raises(
        ValueError, match="says itself how it embeds; leave out `recipe` and `overrides`"
    ):
        load(tmp_path, **given)


def test_a_run_that_is_not_finished_is_told_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {sources: [{path: demo}]}\n")
    with pytest.raises(ValueError, match=r"without a final adapter; finish it with .*--resume"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "got a JSON list, wanted an object"),
        (json.dumps({"kind": "merged"}), "has no recipe"),
        (json.dumps({"kind": "merged", "recipe": {"x": 1}}), "x: unknown key"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / RECORD) in str(caught.value)
