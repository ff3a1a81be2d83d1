"""The cards of a run, of its export and of its adapter: what they say is so, and their code runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from lowmem_cft.exporting.finished import export_run
from lowmem_cft.inference.loading import load_model
from lowmem_cft.model.backbone import Backbone
from lowmem_cft.model.precision import keep_weight_layout
from lowmem_cft.run_folder import RunFolder
from lowmem_cft.training.card import FOLDER, adapter_card, model_card, write_export_card
from lowmem_cft.training.pipeline import run_recipe
from made_runs import made_metrics
from running import MakeRecipe, Silent

CPU = torch.device("cpu")


@pytest.mark.parametrize("base", ["org/base", "."])
def test_the_card_says_what_was_trained_and_how_it_scores(
    make_recipe: MakeRecipe, base: str
) -> None:
    recipe = make_recipe(loss={"temperature": 0.03})
    text = model_card(recipe, made_metrics(rows_per_s=5.25), base, "adapter")
    data = ModelCard(text).data
    assert data.library_name == "sentence-transformers"
    assert data.base_model == (base if base == "org/base" else None)
    assert "dataset_size:8" in data.tags
    assert "| a | 3 | 50.00 | 50.00 |" in text
    assert "temperature 0.03, hard negatives" in text
    assert "5.2 rows per second" in text


def test_the_card_says_where_a_learned_temperature_ended(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(loss={"learn_temperature": True})
    metrics = made_metrics(rows_per_s=5.0, temperature=0.0312)
    text = model_card(recipe, metrics, "org/base", "merged")
    assert "temperature 0.05 at first and 0.0312 in the end (learned)" in text


def test_an_adapter_export_says_which_base_it_needs(make_recipe: MakeRecipe) -> None:
    recipe, metrics = make_recipe(), made_metrics(rows_per_s=5.0)
    cards = {
        kind: model_card(recipe, metrics, "org/base", kind) for kind in ("adapter", "merged", None)
    }
    assert "bitsandbytes, and the base that it is an adapter of: org/base" in cards["adapter"]
    assert "is an adapter of" not in cards["merged"] + cards[None]
    local = model_card(recipe, metrics, str(Path.cwd()), "adapter")
    assert f"the folder `{Path.cwd()}`" in local
    assert "base_model_name_or_path" in local


def test_a_run_that_was_not_scored_has_no_table(make_recipe: MakeRecipe) -> None:
    metrics = made_metrics(rows_per_s=5.0, before=[], after=[])
    assert "Scores" not in model_card(make_recipe(), metrics, "org/base", "merged")


ROLES = {"template": "the big {text}", "document_template": "a small {text}"}
TEXTS = {
    "vectors": (["It is raining.", "Take an umbrella."], None),
    "queries": (["Is it raining?"], "query"),
    "documents": (["Take an umbrella.", "The sun is out."], "document"),
}


def run_code(card: Path, folder: Path) -> dict[str, Any]:
    """The variables that a card's code leaves, its placeholder being the folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.S)
    assert code.count(FOLDER) == 1
    variables: dict[str, Any] = {}
    exec(code.replace(FOLDER, str(folder)), variables)
    return variables


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize("text", [{}, ROLES], ids=["one template", "roles"])
def test_the_code_gives_the_models_vectors_wherever_the_folder_lies(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str, text: dict[str, str]
) -> None:
    pytest.importorskip("sentence_transformers")
    recipe = make_recipe(
        text=text,
        train={"steps": 1},
        model={"quantization": "none"},
        output={"export": kind},
        eval={"sets": []},
    )
    run, _ = run_recipe(recipe, Silent(), device=CPU)
    ours = load_model(str(run.path), CPU, lambda text: None)
    moved = shutil.move(run.model, tmp_path / "elsewhere")
    wanted = {"queries", "documents"} if text else {"vectors"}
    for folder, limit in ((run.path, 1e-6), (moved, 1e-2 if kind == "merged" else 1e-5)):
        left = run_code(folder / "README.md", folder)
        assert left.keys() & TEXTS.keys() == wanted
        for name in wanted:
            texts, role = TEXTS[name]
            assert left[name] == pytest.approx(ours.embed(texts, role=role), abs=limit)


def test_an_export_made_later_has_its_own_card(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run, _ = run_recipe(
        make_recipe(train={"steps": 1}, eval={"sets": []}, output={"export": "none"}),
        Silent(),
        device=CPU,
    )
    assert "lc.load" in (run.path / "README.md").read_text()
    assert "the folder `model`" not in (run.path / "README.md").read_text()
    target = tmp_path / "merged"
    export_run(run.path, target, "merged", CPU, Silent())
    write_export_card(RunFolder(run.path), target)
    card = (target / "README.md").read_text()
    assert "model.encode(" in card
    assert "is an adapter of" not in card


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_adapters_code_gives_its_hidden_states(
    make_recipe: MakeRecipe, quantization: str
) -> None:
    recipe = make_recipe(
        text=ROLES,
        train={"steps": 1},
        model={"quantization": quantization, "keep_layers": 2},
        eval={"every": 1, "keep_best": True},
        output={"export": "none"},
    )
    run, _ = run_recipe(recipe, Silent(), device=CPU)
    ours = load_model(str(run.path), CPU, lambda text: None).encoder.model
    ids = torch.tensor([[5, 6, 7, 8]])
    for folder in (run.adapter, run.best):
        model = run_code(folder / "README.md", folder)["model"].eval()
        keep_weight_layout(model)  # else bitsandbytes rounds scales for inference on some CPUs
        with torch.no_grad():
            theirs, wanted = (m(input_ids=ids).last_hidden_state for m in (model, ours))
        assert np.allclose(theirs, wanted, atol=1e-5)
        card = (folder / "README.md").read_text()
        assert "- a document: 'a small {text}'" in card
        assert "More Information Needed" not in card
        assert "base_model" not in ModelCard(card).data.to_dict()


def test_an_adapter_of_a_hub_model_names_it(make_recipe: MakeRecipe) -> None:
    backbone = Backbone(None, None, "org/base", torch.float32, {"dtype": "float32"}, {})
    card = adapter_card(make_recipe(), backbone)
    data = ModelCard(card).data
    assert (data.library_name, data.base_model) == ("peft", "org/base")
    assert "- a text: '{text}', the text cut to 16 tokens" in card
