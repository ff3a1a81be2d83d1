"""A run as one call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bidirectional import BIDIRECTIONAL, build
from lowmem_cft.exporting.check import MIN_COSINE
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.training import pipeline
from lowmem_cft.training.records import read_lines
from running import MakeRecipe, Silent
from tiny import tiny_tokenizer


def test_loss_falls_and_all_files_are_there(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    made = make_recipe(train={"steps": 30}, lora={"dropout": 0.0})
    folder, metrics = pipeline.run_recipe(made, observer)
    assert observer.lines[-1].loss < 0.5 * observer.lines[0].loss
    assert [line.step for line in read_lines(folder)] == list(range(1, 31))
    assert metrics.export.checked is True
    assert metrics.export.min_cosine >= MIN_COSINE["adapter"]
    assert metrics.to_json() == json.loads(folder.metrics.read_text())
    for path in ("recipe.yaml", "README.md", "adapter/adapter_model.safetensors"):
        assert (folder.path / path).is_file(), path
    for path in ("modules.json", "README.md", "tokenizer.json", "lowmem_cft.json"):
        assert (folder.model / path).is_file(), path
    assert load_recipe(str(folder.recipe)) == made


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("family", "pooling", "kind"), [("bert", "cls", "adapter"), ("gemma-3", "mean", "merged")]
)
def test_a_model_that_is_not_causal_learns_and_is_exported(
    make_recipe: MakeRecipe, tmp_path: Path, family: str, pooling: str, kind: str
) -> None:
    base = tmp_path / family
    build(BIDIRECTIONAL[family](), torch.float32).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    observer = Silent()
    made = make_recipe(
        model={"id": str(base), "quantization": "none"},
        embedding={"pooling": pooling},
        train={"steps": 20},
        output={"export": kind},
    )
    folder, metrics = pipeline.run_recipe(made, observer)
    assert observer.lines[-1].loss < 0.7 * observer.lines[0].loss
    assert metrics.export.checked is True
    assert metrics.export.min_cosine >= MIN_COSINE[kind]
    assert not any(
        "pooler" in name for name in load_file(folder.adapter / "adapter_model.safetensors")
    )


def test_mistakes_leave_no_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for sections in (
        {"data": {"sources": [{"path": str(tmp_path / "missing.jsonl")}]}},
        {"train": {"logical_batch": 41}},
        {"model": {"id": "./nowhere"}},
        {"lora": {"targets": ["no_such_layer"]}},
        {"train": {"optimizer": "paged_adamw_8bit"}},
        {"embedding": {"pooling": "cls"}},
        {"eval": {"sets": ["STS99"]}},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            pipeline.run_recipe(make_recipe(**sections), Silent())
        assert not (tmp_path / "runs" / "tiny").exists(), sections


def test_overwrite_with_a_mistake_keeps_the_old_run(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder, _ = pipeline.run_recipe(make_recipe(train={"steps": 1}), Silent())
    before = folder.metrics.read_text()
    wrong = make_recipe(data={"sources": [{"path": str(tmp_path / "gone.jsonl")}]})
    with pytest.raises(ValueError, match=r"gone.jsonl"):
        pipeline.run_recipe(wrong, Silent(), overwrite=True)
    assert folder.metrics.read_text() == before
    pipeline.run_recipe(make_recipe(train={"steps": 1}), Silent(), overwrite=True)
    assert [entry.name for entry in folder.path.parent.iterdir()] == ["tiny"]


def test_padding_and_plan_are_in_log_and_report(make_recipe: MakeRecipe) -> None:
    observer = Silent()
    _, metrics = pipeline.run_recipe(make_recipe(train={"steps": 2}), observer)
    assert metrics.plan.backward_tokens == 64
    assert metrics.plan.kept_tokens is None, "a tiny model's graphs fit"
    shares = [line.padding_share for line in observer.lines]
    assert min(shares) <= metrics.padding_share <= max(shares)
    assert 0 <= max(shares) < 0.5
