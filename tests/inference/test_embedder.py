"""A model's name becomes what embeds, normalised or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem_cft.inference import embedder


def test_an_embedder_with_and_without_normalisation(tiny_folder: Path) -> None:
    texts = ["the cat sat", "a dog ran in the house", "rain"]
    load = lambda normalize: embedder.load_embedder(
        str(tiny_folder),
        torch.device("cpu"),
        lambda text: None,
        overrides=["model.dtype=fp32", "embedding.normalize=true"],
        normalize=normalize,
    ).embed(texts)
    unit, raw = load(True), load(False)
    assert np.linalg.norm(unit, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (abs(lengths - 1) > 0.01).all()
    assert raw / lengths == pytest.approx(unit, abs=1e-5)
    assert (load(None) == unit).all()


def test_a_plain_model_takes_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="leave out `recipe` and `overrides`"):
        embedder.load_embedder(
            str(tmp_path), torch.device("cpu"), lambda text: None, overrides=["text.max_tokens=3"]
        )
    (tmp_path / "lowmem_cft.json").write_text("{}")
    assert not embedder.is_plain_sentence_transformer(tmp_path)
