"""A model's name becomes what embeds texts, with vectors of length 1 or as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.inference.embedder import (
    is_plain_sentence_transformer,
    load_embedder,
    normalized_or_not,
)
from lowmem_cft.inference.loading import Embedder
from lowmem_cft.model.exported import RECORD

TEXTS = ["the cat sat", "a dog ran in the house", "rain"]


def load(folder: Path, *overrides: str, **options: Any) -> Any:
    given = ["model.dtype=fp32", *overrides]
    return load_embedder(
        str(folder), torch.device("cpu"), lambda text: None, overrides=given, **options
    )


def lengths(vectors: Any) -> Any:
    return np.linalg.norm(vectors, axis=1)


def test_normalisation_is_asked_of_an_embedder_and_changes_it_not(tiny_folder: Path) -> None:
    embedder = load(tiny_folder, "embedding.normalize=true")
    raw = normalized_or_not(embedder, False)(TEXTS)
    assert (abs(lengths(raw) - 1) > 0.01).all()
    assert lengths(embedder.embed(TEXTS)) == pytest.approx(np.ones(3), abs=1e-5)
    unit = normalized_or_not(embedder, None)(TEXTS)
    assert unit == pytest.approx(raw / lengths(raw)[:, None], abs=1e-5)


@pytest.mark.parametrize("own", ["true", "false"])
@pytest.mark.parametrize("normalize", [True, False, None])
def test_normalisation_of_a_loaded_model(
    tiny_folder: Path, own: str, normalize: bool | None
) -> None:
    embedder = load(tiny_folder, f"embedding.normalize={own}", normalize=normalize)
    of_length_1 = own == "true" if normalize is None else normalize
    assert (abs(lengths(embedder.embed(TEXTS)) - 1) < 1e-4).all() == of_length_1


def test_float32_reaches_the_embedder(tiny_folder: Path) -> None:
    narrow, wide = (load(tiny_folder, "model.dtype=bf16", float32=on) for on in (False, True))
    assert isinstance(wide, Embedder)
    assert (narrow.float32, wide.float32) == (False, True)
    apart = abs(narrow.embed(TEXTS) - wide.embed(TEXTS)).max()
    assert 0 < apart < 0.1


def test_whose_folder_it_is(tmp_path: Path) -> None:
    assert not is_plain_sentence_transformer(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([]))
    assert is_plain_sentence_transformer(tmp_path)
    for given in ({"recipe_name": "demo"}, {}):
        with pytest.raises(ValueError, match="leave out `recipe` and `overrides`"):
            load(tmp_path, **given)
    (tmp_path / RECORD).write_text("{}")
    assert not is_plain_sentence_transformer(tmp_path)
