"""What is wrong with a recipe is said with its place, what was got and what was wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.recipe.errors import RecipeError
from lowmem_cft.recipe.load import load_recipe
from recipe_files import MINIMAL, Write, refusal


@pytest.mark.parametrize(
    ("text", "at", "hint", "allowed"),
    [
        ("trian: {}", "trian", "train", "model, lora, text, embedding, data, loss, train, memory"),
        ("train: {learning-rate: 1}", "train.learning-rate", "learning_rate", "logical_batch, "),
        ("lora: {rnak: 3}", "lora.rnak", "rank", "rank, alpha, dropout, targets, rslora, init"),
        ("memory: {x: 3}", "memory.x", None, "limit, token_budget, keep_graphs, checkpointing"),
        ("loss: {temperature.x: 3}", "loss.temperature.x", "temperature", "temperature, learn_"),
    ],
)
def test_unknown_key(text: str, at: str, hint: str | None, allowed: str, write: Write) -> None:
    path = write(f"{text}\n{MINIMAL}")
    guess = f" (did you mean {hint}?)" if hint else ""
    assert refusal(path).startswith(f"{path}: {at}: unknown key{guess}; allowed: {allowed}")


def test_unknown_key_in_a_source(write: Write) -> None:
    path = write("data:\n  sources:\n    - path: a\n    - {path: b, wheer: {c: d}}\n")
    assert refusal(path) == (
        f"{path}: data.sources.1.wheer: unknown key (did you mean where?); "
        "allowed: path, columns, split, where, limit, seed, weight"
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        # wrong type: no number is taken from a text, no text from a number
        ("train.seed=abc", "train.seed: got 'abc' (str); input should be a valid integer"),
        ("train.seed='7'", "train.seed: got '7' (str); input should be a valid integer"),
        ("train.seed=1.0", "train.seed: got 1.0 (float); input should be a valid integer"),
        ("train.seed=true", "train.seed: got True (bool); input should be a valid integer"),
        ("loss.softmaxes=true", "loss.softmaxes: got True (bool); input should be 'one_way', 'sym"),
        ("loss.softmaxes=oneway", "loss.softmaxes: got 'oneway' (str); input should be 'one_way'"),
        ("loss.hardness=-1", "loss.hardness: got -1 (int); input should be greater than or equal"),
        ("loss.false_negative_margin=.nan", "loss.false_negative_margin: got nan (float); input"),
        ("loss.temperature_bounds=[0, 1]", "loss.temperature_bounds.0: got 0 (int); input should"),
        ("loss.temperature_bounds=[1]", "loss.temperature_bounds.1: missing"),
        ("loss.mask_duplicates=1", "loss.mask_duplicates: got 1 (int); input should be a valid b"),
        ("loss.temperature='0.1'", "loss.temperature: got '0.1' (str); input should be a valid"),
        ("model.id=3", "model.id: got 3 (int); input should be a valid string"),
        ("model.id=null", "model.id: got None (NoneType); input should be a valid string"),
        ("model=3", "model: got 3 (int); input should be a valid dictionary"),
        ("lora.targets=5", "lora.targets: got 5 (int); input should be 'all-linear', 'attention'"),
        ("lora.targets=[1]", "lora.targets.0: got 1 (int); input should be a valid string"),
        ("train.betas=0.9", "train.betas: got 0.9 (float); input should be a valid tuple"),
        ("train.betas=[1, x]", "train.betas.1: got 'x' (str); input should be a valid number"),
        ("data.sources={path: x}", "data.sources: got {'path': 'x'} (dict); input should be a"),
        ("data.sources.0=x", "data.sources.0: got 'x' (str); input should be a valid dictionary"),
        ("data.sources.0.limit=x", "data.sources.0.limit: got 'x' (str); input should be a valid"),
        (
            "data.sources.0.where={a: [1]}",
            "data.sources.0.where.a: got [1] (list); input should be a",
        ),
        ("eval.sets=STS12", "eval.sets: got 'STS12' (str); input should be a valid list"),
        ("model={1: x}", "model.1: got 1 (int); keys should be strings"),
        # impossible value
        ("loss.temperature=0", "loss.temperature: got 0 (int); input should be greater than 0"),
        ("loss.temperature=.nan", "loss.temperature: got nan (float); input should be"),
        ("train.epochs=.inf", "train.epochs: got inf (float); input should be a finite number"),
        ("train.logical_batch=1", "train.logical_batch: got 1 (int); input should be greater than"),
        ("train.warmup_steps=-1", "train.warmup_steps: got -1 (int); input should be greater than"),
        ("train.weight_decay=-1", "train.weight_decay: got -1 (int); input should be greater than"),
        ("lora.dropout=1", "lora.dropout: got 1 (int); input should be less than 1"),
        ("lora.rank=0", "lora.rank: got 0 (int); input should be greater than or equal to 1"),
        ("model.quantization=int8", "model.quantization: got 'int8' (str); input should be 'none'"),
        ("embedding.pooling=max", "embedding.pooling: got 'max' (str); input should be 'last', "),
        ("memory.token_budget=0", "memory.token_budget: got 0 (int); input should be greater than"),
        ("memory.token_budget=x", "memory.token_budget: got 'x' (str); input should be 'auto'"),
        ("data.sources=[]", "data.sources: got [] (list); list should have at least 1 item"),
        ("data={}", "data.sources: missing, and it has no default"),
        ("data.sources=[{}]", "data.sources.0.path: missing, and it has no default"),
    ],
)
def test_wrong_value(override: str, line: str, write: Write) -> None:
    lines = refusal(write(), override).splitlines()
    key, _, reason = line.partition(": ")
    told = reason if key == override.partition("=")[0] else line
    assert any(line.startswith(f"`overrides` {override}: {told}") for line in lines), lines


def test_missing_data(write: Write) -> None:
    path = write("model: {id: x}\n")
    assert refusal(path) == f"{path}: data: missing, and it has no default"


def test_long_values_are_cut(write: Write) -> None:
    (line,) = refusal(write(), f"train.seed={'x' * 500}").splitlines()
    assert "'xxx" in line
    assert "x..." in line
    assert "x" * 100 not in line


def test_everything_wrong_is_told_at_once(write: Write) -> None:
    path = write(f"train: {{stesp: 1}}\nlora: {{rank: 0}}\nmodel: {{id: 3}}\n{MINIMAL}")
    message = refusal(path)
    assert [line.removeprefix(f"{path}: ").split(":")[0] for line in message.splitlines()] == [
        "model.id",
        "lora.rank",
        "train.stesp",
    ]


@pytest.mark.parametrize(
    ("assignment", "meant"),
    [
        ("learning_rate=1e-4", "train.learning_rate"),
        ("train.temperature=0.1", "loss.temperature"),
        ("loss.logical_batch=64", "train.logical_batch"),
        ("train.learningrate=1e-4", "learning_rate"),
        ("max_token=7", "text.max_tokens"),
    ],
)
def test_a_key_of_another_section_is_suggested(assignment: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=rf"unknown key \(did you mean {meant}\?\)"):
        load_recipe("demo", [assignment])


def test_what_is_wrong_with_an_override_is_said_of_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\ntrain: {steps: many}\n")
    with pytest.raises(RecipeError) as refused:
        load_recipe(str(file), ["lora.rank=big", "text={max_tokens: 0}"])
    first, second, third = sorted(str(refused.value).splitlines())
    assert first.startswith(f"{file}: train.steps: got 'many'")
    assert second.startswith("`overrides` lora.rank=big: got 'big'")
    assert third.startswith("`overrides` text={max_tokens: 0}: text.max_tokens: got 0")
