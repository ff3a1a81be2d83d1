"""The tokenizer of an export is the base's again where the export is a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.data.tokens import special_tokens
from lowmem_cft.inference.loading import load_model
from lowmem_cft.model.backbone import load_tokenizer
from lowmem_cft.model.exported import RECORD, plain_tokenizer, read_record
from lowmem_cft.training import pipeline
from running import MakeRecipe, Silent, sentences
from tiny import tiny_tokenizer

TEXTS = ["the cat sat", "", "a dog </s> ran"]


@pytest.fixture
def merged(make_recipe: MakeRecipe) -> Path:
    made = make_recipe(
        text={"template": "the man : {text} in two"},
        train={"steps": 1},
        eval={"sets": []},
        output={"export": "merged"},
    )
    return pipeline.run_recipe(made, Silent())[0].model


def test_a_merged_export_as_the_next_base(
    merged: Path, tiny_folder: Path, make_recipe: MakeRecipe
) -> None:
    """Its template stands around a text once."""
    again, base = load_tokenizer(str(merged), None), load_tokenizer(str(tiny_folder), None)
    assert special_tokens(again) == special_tokens(base)
    assert again(TEXTS)["input_ids"] == base(TEXTS)["input_ids"]
    made = make_recipe(
        model={"id": str(merged), "quantization": "none"},
        text={"template": "the man : {text} in two"},
        train={"steps": 1, "learning_rate": 1e-9},
        output={"name": "next"},
    )
    observer = Silent()
    folder, metrics = pipeline.run_recipe(made, observer)
    assert metrics.export.checked is True
    assert any("trained under the template 'the man : {text} in two'" in s for s in observer.said)
    texts = sentences(9, 6)
    cpu = torch.device("cpu")
    vectors = [load_model(str(name), cpu, print).embed(texts) for name in (merged, folder.path)]
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5


@pytest.mark.parametrize("own", [True, False], ids=["a normaliser of its own", "none"])
@pytest.mark.parametrize("template", ["{text}", "the {text}", "the {text} is"])
def test_exports_of_older_versions(template: str, own: bool) -> None:
    """They had the template in the normaliser, and the end token behind the text."""
    from tokenizers import normalizers
    from tokenizers.processors import TemplateProcessing

    base: Any = tiny_tokenizer()
    if own:
        base.backend_tokenizer.normalizer = normalizers.Lowercase()
    exported: Any = tiny_tokenizer()
    head, _, tail = template.partition("{text}")
    steps: list[Any] = [normalizers.Prepend(head)] if head else []
    steps += [normalizers.Replace("$", tail)] if tail else []
    if steps or own:
        exported.backend_tokenizer.normalizer = normalizers.Sequence(
            [*steps, *([normalizers.Lowercase()] if own else [])]
        )
    exported.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    record = {"recipe": {"text": {"template": template, "document_template": None}}}
    plain = plain_tokenizer(exported, record)
    for text in ("The cat", "", "A dog ran"):
        assert plain(text)["input_ids"] == [*base(text)["input_ids"], 2]


def test_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match=rf"{RECORD}: cannot be read .*export the run again"):
        read_record(tmp_path)
    (tmp_path / RECORD).write_text(json.dumps({"kind": "adapter"}))
    with pytest.raises(ValueError, match=rf"{RECORD}: has no recipe"):
        read_record(tmp_path)
