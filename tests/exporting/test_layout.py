"""What sentence-transformers loads embeds as the run did, or is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem_cft.exporting.check import MIN_COSINE
from lowmem_cft.inference.embed import embed_texts
from lowmem_cft.inference.loading import load_model
from lowmem_cft.training import pipeline
from running import MakeRecipe, Silent, sentences

CPU = torch.device("cpu")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_exports_embed_alike_however_loaded(
    make_recipe: MakeRecipe, kind: str, quantization: str
) -> None:
    made = make_recipe(
        model={"quantization": quantization, "keep_layers": 2},
        text={"template": "the man is {text} in two", "append_eos": False},
        embedding={"pooling": "last"},
        output={"export": kind},
    )
    folder, metrics = pipeline.run_recipe(made, Silent())
    assert metrics.export.checked is True
    texts = sentences(9, 12)
    vectors = []
    for name in (folder.path, folder.model):
        loaded = load_model(str(name), CPU, print)
        vectors.append(embed_texts(loaded.encoder, loaded.tokenizer, texts, loaded.text_format))
    cosine = (vectors[0] * vectors[1]).sum(axis=1)
    assert cosine.min() >= MIN_COSINE[kind]  # type: ignore[index]
    assert np.abs(vectors[0][0] - vectors[0][1]).max() > 1e-2, "all texts embed alike"


def test_templates_by_role_become_prompts(make_recipe: MakeRecipe) -> None:
    text = {"template": "the man : {text}", "document_template": "the cat {text}"}
    folder, metrics = pipeline.run_recipe(make_recipe(text=text), Silent())
    assert metrics.export.checked is True
    layout = json.loads((folder.model / "config_sentence_transformers.json").read_text())
    assert layout["prompts"] == {"query": "the man : ", "document": "the cat "}


def test_templates_that_prompts_cannot_say(make_recipe: MakeRecipe) -> None:
    text = {"template": "{text} is", "document_template": "{text} was"}
    with pytest.raises(ValueError, match=r"document_template: .*output.export: none"):
        pipeline.run_recipe(make_recipe(text=text), Silent())


def test_mistakes_of_the_layout_are_found_before_training(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    text = {"template": "{text} is", "document_template": "{text} was"}
    with pytest.raises(ValueError, match=r"document_template"):
        pipeline.run_recipe(make_recipe(text=text), observer)
    assert not observer.said


def test_base_is_named_by_its_whole_path(
    make_recipe: MakeRecipe, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export must load from another working folder."""
    monkeypatch.chdir(tiny_folder.parent)
    folder, _ = pipeline.run_recipe(
        make_recipe(model={"id": f"./{tiny_folder.name}"}, train={"steps": 1}), Silent()
    )
    config = json.loads((folder.model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)
