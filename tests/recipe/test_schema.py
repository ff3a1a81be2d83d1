"""The recipe: its keys, the papers' values in the presets, and what does not go together."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from lowmem_cft.recipe.load import PRESETS, load_recipe, preset_names, to_yaml
from lowmem_cft.recipe.schema import Recipe
from recipe_files import MINIMAL, Write, refusal

OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
LLAMA_SIZES = ("7b", "13b", "30b")
CFT_MODELS = {
    "cft-minicpm-2b": "openbmb/MiniCPM-2B-dpo-bf16",
    "cft-gemma-2b": "google/gemma-2b-it",
    "cft-phi-2": "microsoft/phi-2",
    "cft-smollm2-135m": "smollm2-135m",
}
PROMPTEOL_MODELS = {
    **{f"prompteol-opt-{size}": f"facebook/opt-{size}" for size in OPT_SIZES},
    **{f"prompteol-llama-{size}": f"huggyllama/llama-{size}" for size in LLAMA_SIZES},
    "prompteol-smollm2-135m": "smollm2-135m",
}

KEYS = [
    "model.id",
    "model.revision",
    "model.quantization",
    "model.double_quantization",
    "model.dtype",
    "model.attention",
    "model.keep_layers",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.targets",
    "lora.rslora",
    "lora.init",
    "text.template",
    "text.document_template",
    "text.tail",
    "text.append_eos",
    "text.max_tokens",
    "embedding.pooling",
    "embedding.normalize",
    "data.sources.path",
    "data.sources.columns",
    "data.sources.split",
    "data.sources.where",
    "data.sources.limit",
    "data.sources.seed",
    "data.sources.weight",
    "data.on_bad_row",
    "loss.temperature",
    "loss.learn_temperature",
    "loss.temperature_bounds",
    "loss.softmaxes",
    "loss.hard_negatives",
    "loss.mask_duplicates",
    "loss.false_negative_margin",
    "loss.false_negative_relative",
    "loss.on_no_negatives",
    "loss.hardness",
    "loss.hardness_on",
    "train.logical_batch",
    "train.epochs",
    "train.steps",
    "train.learning_rate",
    "train.optimizer",
    "train.betas",
    "train.epsilon",
    "train.weight_decay",
    "train.schedule",
    "train.warmup_steps",
    "train.max_grad_norm",
    "train.seed",
    "train.duplicates",
    "train.save_every",
    "train.save_minutes",
    "memory.limit",
    "memory.token_budget",
    "memory.keep_graphs",
    "memory.checkpointing",
    "memory.embedding_dtype",
    "memory.offload_embeddings",
    "eval.sets",
    "eval.every",
    "eval.keep_best",
    "eval.limit",
    "eval.token_budget",
    "output.folder",
    "output.name",
    "output.export",
]


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        kind: Any = info.annotation
        if typing.get_origin(kind) is list:
            kind = typing.get_args(kind)[0]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from all_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_keys_are_frozen() -> None:
    """A key that appears or goes is seen in review: users' recipes hold these names."""
    assert list(all_keys(Recipe)) == KEYS


# --- presets --------------------------------------------------------------------------------


def test_preset_names_are_the_known_ones() -> None:
    assert preset_names() == sorted(["demo", *CFT_MODELS, *PROMPTEOL_MODELS])


def test_presets_say_only_known_keys_themselves() -> None:
    """A base too: its unknown keys would be blamed on the presets that extend it."""
    for entry in PRESETS.iterdir():
        values = yaml.safe_load(entry.read_text(encoding="utf-8"))
        values.pop("extends", None)
        for section, inside in values.items():
            for key in inside:
                known = (f"{section}.{key}", f"{section}.{key}.path")
                assert any(path in KEYS for path in known), (entry.name, section, key)


@pytest.mark.parametrize("name", CFT_MODELS)
def test_cft_presets_hold_the_papers_values(name: str) -> None:
    recipe = load_recipe(name)
    model, lora, text, loss, train = (
        recipe.model,
        recipe.lora,
        recipe.text,
        recipe.loss,
        recipe.train,
    )
    assert (model.id, model.quantization) == (CFT_MODELS[name], "nf4")
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 32.0, 0.1)
    assert (lora.targets, lora.init, lora.rslora) == (["q_proj", "v_proj"], "gaussian", False)
    assert (text.template, text.document_template) == ("{text}", None)
    assert (text.append_eos, text.max_tokens, recipe.embedding.pooling) == (True, 149, "eos")
    assert (loss.temperature, loss.hard_negatives) == (0.05, "batch")
    assert (loss.softmaxes, loss.mask_duplicates) == ("one_way", False)
    assert (loss.learn_temperature, loss.false_negative_margin, loss.hardness) == (False, None, 0)
    assert (train.learning_rate, train.schedule, train.warmup_steps) == (5e-5, "cosine", 100)
    assert (train.logical_batch, train.num_steps(60)) == (60, 1)
    assert (train.weight_decay, train.max_grad_norm, train.seed) == (1e-4, 1.0, 7)
    assert (train.betas, train.epsilon) == ((0.9, 0.999), 1e-8)
    assert recipe.eval.sets == [
        *("STS12", "STS13", "STS14", "STS15", "STS16", "STS17"),
        *("STSBenchmark-test", "BIOSSES", "SICK-R"),
    ]
    assert (recipe.eval.every, recipe.eval.keep_best) == (None, False)


@pytest.mark.parametrize("name", PROMPTEOL_MODELS)
def test_prompteol_presets_hold_the_papers_values(name: str) -> None:
    recipe = load_recipe(name)
    model, lora, text, loss, train = (
        recipe.model,
        recipe.lora,
        recipe.text,
        recipe.loss,
        recipe.train,
    )
    assert (model.id, model.quantization) == (PROMPTEOL_MODELS[name], "nf4")
    assert model.double_quantization
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 16.0, 0.05)
    assert (lora.targets, lora.init, lora.rslora) == ("all-linear", "default", False)
    assert text.template == 'This sentence : "{text}" means in one word:"'
    assert text.document_template is None
    assert (text.append_eos, text.max_tokens, recipe.embedding.pooling) == (False, 32, "last")
    assert (loss.temperature, loss.hard_negatives) == (0.05, "batch")
    assert (loss.softmaxes, loss.mask_duplicates) == ("one_way", False)
    assert (loss.learn_temperature, loss.false_negative_margin, loss.hardness) == (False, None, 0)
    assert (train.learning_rate, train.schedule, train.warmup_steps) == (5e-4, "linear", 100)
    assert train.logical_batch == (200 if name.endswith("-13b") else 256)
    assert train.num_steps(10 * train.logical_batch) == 10  # one epoch
    assert (train.weight_decay, train.max_grad_norm, train.seed) == (0.0, 1.0, 42)
    assert recipe.eval.sets == [
        *("STSBenchmark-dev", "STS12", "STS13", "STS14", "STS15", "STS16"),
        *("STSBenchmark-test", "SICK-R"),
    ]
    assert (recipe.eval.every, recipe.eval.keep_best) == (50, True)


@pytest.mark.parametrize("name", [*CFT_MODELS, *PROMPTEOL_MODELS])
def test_paper_presets_train_on_the_papers_file(name: str) -> None:
    sources = load_recipe(name).data.sources
    assert [(s.path, s.columns, s.limit, s.weight) for s in sources] == [
        ("nli_for_simcse.csv", None, None, 1.0)
    ]


@pytest.mark.parametrize(
    ("name", "steps"),
    [("cft-gemma-2b", 4593), ("prompteol-opt-1.3b", 1077), ("prompteol-opt-13b", 1378)],
)
def test_length_of_the_papers_runs(name: str, steps: int) -> None:
    assert load_recipe(name).train.num_steps(275_601) == steps


def test_num_steps() -> None:
    recipe = load_recipe("demo", ["train.steps=null", "train.logical_batch=10"])
    assert recipe.train.num_steps(100) == 10
    assert recipe.train.num_steps(3) == 1
    assert load_recipe("demo").train.num_steps(1) == 40
    half = load_recipe("demo", ["train.steps=null", "train.logical_batch=10", "train.epochs=2.5"])
    assert half.train.num_steps(100) == 25


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.004, 0.005, 1.0, 2.0])
def test_a_learned_temperature_begins_between_its_bounds(temperature: float, write: Write) -> None:
    path, override = write(), f"loss.temperature={temperature}"
    assert refusal(path, override, "loss.learn_temperature=true") == (
        f"{path}: loss: temperature: got {temperature} with learn_temperature, wanted it between "
        "temperature_bounds, 0.005 and 1.0, and neither of them"
    )
    assert load_recipe(path, [override]).loss.temperature == temperature
    wider = "loss.temperature_bounds=[1e-3, 5]"
    assert load_recipe(
        path, [override, wider, "loss.learn_temperature=true"]
    ).loss.learn_temperature


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.false_negative_relative=true"], "which needs a false_negative_margin"),
        (
            ["loss.hardness=1", "loss.hardness_on=hard", "loss.hard_negatives=none"],
            "hardness_on: got hard, but hard_negatives is none",
        ),
    ],
)
def test_loss_options_that_would_do_nothing(
    overrides: list[str], message: str, write: Write
) -> None:
    path = write()
    assert refusal(path, *overrides).endswith(message)
    assert load_recipe(path, overrides[1:])


def test_bounds_round_trip(write: Write) -> None:
    recipe = load_recipe(write(), ["loss.temperature_bounds=[0.01, 0.5]"])
    assert recipe.loss.temperature_bounds == (0.01, 0.5)
    assert load_recipe(write(to_yaml(recipe), "again.yaml")).loss == recipe.loss


def test_epochs_and_steps_both(write: Write) -> None:
    path = write(f"train: {{epochs: 2, steps: 3}}\n{MINIMAL}")
    assert refusal(path) == (
        f"{path}: train: got epochs: 2.0 and steps: 3, wanted one of them (set the other to null)"
    )


def test_eos_pooling_without_eos(write: Write) -> None:
    path = write()
    assert refusal(path, "text.append_eos=false").endswith(
        "embedding.pooling: got eos, which needs text.append_eos: true"
    )
    recipe = load_recipe(path, ["text.append_eos=false", "embedding.pooling=last"])
    assert recipe.embedding.pooling == "last"


@pytest.mark.parametrize("template", ["no slot", "{text} and {text}", "{ text }", ""])
@pytest.mark.parametrize("key", ["template", "document_template"])
def test_template_without_its_slot(key: str, template: str, write: Write) -> None:
    path = write()
    message = refusal(path, f"text.{key}='{template}'")
    assert message == f"{path}: text: {key}: got {template!r}, wanted {{text}} in it exactly once"


def test_template_may_have_other_braces(write: Write) -> None:
    assert load_recipe(write(), ["text.template='{a} {} {text}'"]).text.template == "{a} {} {text}"


@pytest.mark.parametrize(
    "overrides", [["eval.keep_best=true"], ["eval.every=5", "eval.sets=[]", "eval.keep_best=true"]]
)
def test_keep_best_without_scores(overrides: list[str], write: Write) -> None:
    path = write()
    assert refusal(path, *overrides) == (
        f"{path}: eval: keep_best: got true, but it needs `every` and at least one of `sets`"
    )


def test_recipe_cannot_be_changed() -> None:
    recipe = load_recipe("demo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.lora.rank = 3


def test_other_values_in_one_section() -> None:
    recipe = load_recipe("demo")
    changed = recipe.with_values("text", template="the man is {text}", max_tokens=9)
    assert (changed.text.template, changed.text.max_tokens) == ("the man is {text}", 9)
    assert changed.with_values("text", **recipe.text.model_dump()) == recipe
    assert recipe == load_recipe("demo"), "the recipe itself has changed"
