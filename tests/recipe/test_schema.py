"""The recipe: presets and the papers' values in them, overrides, `extends`, every kind of error."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from lowmem_cft.recipe.errors import RecipeError
from lowmem_cft.recipe.load import (
    PRESETS,
    apply_override,
    load_recipe,
    merge,
    parse_recipe,
    preset_names,
    to_yaml,
)
from lowmem_cft.recipe.schema import Recipe

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

MINIMAL = "data:\n  sources:\n    - path: rows.csv\n"
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe file, by default one that passes, and return its path."""

    def write_file(text: str = MINIMAL, name: str = "my.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def refusal(name: str, *overrides: str) -> str:
    """The message with which a recipe is refused; every line of a check begins with its file."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


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


@pytest.mark.parametrize("name", preset_names())
def test_preset_round_trips(name: str, write: Write) -> None:
    recipe = load_recipe(name)
    assert recipe.output.name == name
    text = to_yaml(recipe)
    assert load_recipe(write(text)) == recipe
    assert parse_recipe(yaml.safe_load(text), "saved") == recipe  # plain YAML 1.1 reads it too


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


# --- reading and writing --------------------------------------------------------------------


def test_least_recipe_takes_its_file_name(write: Write) -> None:
    recipe = load_recipe(write(name="some.run.yaml"))
    assert recipe.output.name == "some.run"
    assert load_recipe(write("output: {name: given}\n" + MINIMAL)).output.name == "given"


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "+1e-4", "0.1e-3", ".1e-3", "1.e-4", "0.0001"])
def test_floats_in_a_file(number: str, write: Write) -> None:
    assert (
        load_recipe(write(f"train: {{learning_rate: {number}}}\n{MINIMAL}")).train.learning_rate
        == 1e-4
    )


@pytest.mark.parametrize("text", ["1e4", "12e5", ".5e3", "null", "true", "12", "1.5", "é", "a: b"])
def test_texts_that_look_like_other_things_round_trip(text: str, write: Write) -> None:
    values = {"model": {"revision": text}, "data": {"sources": [{"path": "x"}]}}
    recipe = load_recipe(write(to_yaml(parse_recipe(values, "here"))))
    assert recipe.model.revision == text


def test_round_trip_of_every_kind_of_value(write: Write) -> None:
    recipe = load_recipe(
        "cft-phi-2",
        [
            "data.sources.0.where={label: '1e3', kind: entailment}",
            "data.sources.0.columns=[a, b, c]",
            "train.betas=[0.9, 0.95]",
            "train.max_grad_norm=null",
            "memory.token_budget=4096",
            'text.document_template="{text} \\n"',
        ],
    )
    assert recipe.data.sources[0].where == {"label": "1e3", "kind": "entailment"}
    assert recipe.train.betas == (0.9, 0.95)
    assert recipe.text.document_template == "{text} \n"
    assert load_recipe(write(to_yaml(recipe))) == recipe


def test_merge_goes_key_by_key_and_changes_neither() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "l": [1, 2], "s": 3}
    over = {"a": {"c": {"e": 4}}, "l": [5], "s": {"t": 6}, "n": None}
    assert merge(base, over) == {
        "a": {"b": 1, "c": {"d": 2, "e": 4}},
        "l": [5],
        "s": {"t": 6},
        "n": None,
    }
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "l": [1, 2], "s": 3}
    assert over["a"] == {"c": {"e": 4}}


# --- extends --------------------------------------------------------------------------------


def test_extends_a_preset(write: Write) -> None:
    recipe = load_recipe(write("extends: prompteol-opt-13b\nlora: {rank: 4}\ntrain: {seed: 1}\n"))
    expected = load_recipe(
        "prompteol-opt-13b", ["lora.rank=4", "train.seed=1", "output.name=my"]
    )  # everything else stays, down to the base of the preset
    assert recipe == expected
    assert recipe.train.logical_batch == 200


def test_extends_a_file_beside_it(write: Write) -> None:
    write("lora: {rank: 2, alpha: 3}\n" + MINIMAL, "base.yaml")
    write("extends: ../base.yaml\nlora: {rank: 4}\n", "sub/middle.yaml")
    recipe = load_recipe(write("extends: sub/middle.yaml\nlora: {dropout: 0.5}\n"))
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (4, 3.0, 0.5)
    assert recipe.data.sources[0].path == "rows.csv"


def test_file_may_have_the_name_of_the_preset_it_extends(write: Write) -> None:
    recipe = load_recipe(write("extends: demo\nlora: {rank: 2}\n", "demo.yaml"))
    assert (recipe.lora.rank, recipe.model.keep_layers) == (2, 10)


def test_presets_do_not_extend_files(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(write("lora: {rank: 3}\n", "_cft")).parent)
    assert load_recipe("cft-phi-2").lora.rank == 8


def test_file_goes_before_the_preset_of_its_name(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(write("lora: {rank: 3}\n" + MINIMAL, "demo")).parent)
    assert load_recipe("demo").lora.rank == 3


@pytest.mark.parametrize(
    "files",
    [
        {"my.yaml": "my.yaml"},
        {"my.yaml": "./other.yaml", "other.yaml": "my.yaml"},
        {"my.yaml": "b.yaml", "b.yaml": "sub/c.yaml", "sub/c.yaml": "../sub/../my.yaml"},
        {"my.yaml": "b.yaml", "b.yaml": "c.yaml", "c.yaml": "sub/../b.yaml", "sub/x": ""},
    ],
)
def test_extends_cycle(files: dict[str, str], write: Write, tmp_path: Path) -> None:
    for name, base in files.items():
        write(f"extends: {base}\n{MINIMAL}", name)
    message = refusal(str(tmp_path / "my.yaml"))
    assert "extends: got " in message
    assert "leads back to itself" in message
    assert "wanted a chain that ends" in message
    for name in files:
        if name.endswith(".yaml"):
            assert str((tmp_path / name).resolve()) in message


@pytest.mark.parametrize("base", ["[demo]", "3", "{a: b}", "true"])
def test_extends_of_no_name(base: str, write: Write) -> None:
    path = write(f"extends: {base}\n{MINIMAL}")
    message = refusal(path)
    assert message.startswith(f"{path}: extends: got {yaml.safe_load(base)!r}")
    assert message.endswith("wanted another recipe's name")


def test_extends_of_a_missing_one(write: Write) -> None:
    path = write(f"extends: prompteol-opt-13\n{MINIMAL}")
    message = refusal(path)
    assert message.startswith("prompteol-opt-13: no such recipe file, and no preset of that name")
    assert "did you mean prompteol-opt-13b?" in message
    assert f"{path} extends it" in message


# --- overrides ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "wanted"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=3", 3),
        ("train.max_grad_norm=null", None),
        ("train.max_grad_norm=", None),
        ("train.schedule=constant", "constant"),
        ("train.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("lora.targets=[q_proj, k_proj]", ["q_proj", "k_proj"]),
        ("lora.targets=mlp", "mlp"),
        ("lora.targets.1=k_proj", ["q_proj", "k_proj"]),
        ("lora={rank: 3}", 3),
        ("eval.sets=[]", []),
        ("data.sources.0.path=a=b.csv", "a=b.csv"),
        ("data.sources.0.path=other.csv", "other.csv"),
        ("data.sources.0.where.label=entailment", "entailment"),
        ("output.name=x", "x"),
        (" model.keep_layers =4", 4),
        ("memory.token_budget=8192", 8192),
        ('text.template=\'a : "{text}" b:"\'', 'a : "{text}" b:"'),
    ],
)
def test_override(assignment: str, wanted: object) -> None:
    value: Any = load_recipe("cft-phi-2", [assignment])
    for key in assignment.partition("=")[0].strip().split("."):
        if isinstance(value, dict):
            value = value[key]
        elif isinstance(value, list):
            value = value if wanted == value else value[int(key)]
        else:
            value = getattr(value, key)
    assert (value.rank if assignment.startswith("lora={") else value) == wanted


def test_override_replaces_a_whole_section() -> None:
    recipe = load_recipe("cft-phi-2", ["lora={rank: 3}"])
    assert (recipe.lora.rank, recipe.lora.alpha) == (3, 16.0)  # alpha: the default, not the paper's


def test_overrides_go_in_order_and_make_what_is_missing() -> None:
    values: dict[str, Any] = {}
    for assignment in ("a.b.c=1", "a.b.c=2", "a.l=[{x: 1}, {x: 2}]", "a.l.1.x=3", "a.l.0=4"):
        apply_override(values, assignment)
    assert values == {"a": {"b": {"c": 2}, "l": [4, {"x": 3}]}}


def test_override_leaves_the_other_length_to_the_user() -> None:
    assert load_recipe("cft-phi-2", ["train.steps=10"]).train.num_steps(10**6) == 10


@pytest.mark.parametrize("assignment", ["train.steps", "=3", ".steps=3", "train.=3", "a..b=3", ""])
def test_override_of_no_form(assignment: str) -> None:
    message = refusal("demo", assignment)
    assert message == f"`overrides` {assignment}: wanted SECTION.KEY=VALUE, as train.steps=100"


@pytest.mark.parametrize(
    ("assignment", "at", "key"),
    [
        ("model.id.x=3", "model.id", "x"),  # through a scalar
        ("lora.rank.0=3", "lora.rank", "0"),
        ("data.sources.1.path=x", "data.sources", "1"),  # out of range
        ("data.sources.1=x", "data.sources", "1"),
        ("eval.sets.9=x", "eval.sets", "9"),
        ("data.sources.-1.path=x", "data.sources", "-1"),
        ("data.sources.path=x", "data.sources", "path"),
        ("data.sources.².path=x", "data.sources", "²"),  # a digit to str, no number to int
    ],
)
def test_override_that_leads_nowhere(assignment: str, at: str, key: str) -> None:
    assert (
        refusal("cft-phi-2", assignment) == f"`overrides` {assignment}: {at} has no {key!r} to set"
    )


def test_override_that_is_not_yaml() -> None:
    assert "`overrides` eval.sets=[STS12: not readable as YAML" in refusal(
        "demo", "eval.sets=[STS12"
    )


def test_override_is_checked_like_a_file() -> None:
    message = refusal("demo", "train.stesp=3")
    assert message.startswith("preset demo: train.stesp: unknown key (did you mean steps?)")


# --- refusals -------------------------------------------------------------------------------


def test_unknown_preset() -> None:
    message = refusal("cft-phi-3")
    assert message.startswith("cft-phi-3: no such recipe file, and no preset of that name")
    assert "(did you mean cft-phi-2?)" in message
    assert message.endswith(f"presets: {', '.join(preset_names())}")
    assert "did you mean" not in refusal("/nowhere/at-all")
    for name in ("", "a/../demo", "nowhere/demo.yaml"):
        assert "no such recipe file" in refusal(name)


@pytest.mark.parametrize("text", ["a: [", "\ta: b", "a: b: c", "a: 'b", "%", "a: 2024-13-01", "\0"])
def test_not_yaml(text: str, write: Write) -> None:
    path = write(text)
    assert refusal(path).startswith(f"{path}: not readable as YAML: ")


def test_yaml_that_makes_objects_is_refused(write: Write) -> None:
    path = write("model: !!python/object/apply:os.getcwd []\n" + MINIMAL)
    assert "not readable as YAML: could not determine a constructor" in refusal(path)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert refusal(str(path)).startswith(f"{path}: not readable as text: 'utf-8' codec")


@pytest.mark.parametrize(
    ("text", "got"), [("", "NoneType"), ("- a", "list"), ("abc", "str"), ("3", "int")]
)
def test_not_a_mapping(text: str, got: str, write: Write) -> None:
    path = write(text)
    assert refusal(path) == f"{path}: got {got}, wanted sections such as `model:`"


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
        ("data.sources.0.where={a: 1}", "data.sources.0.where.a: got 1 (int); input should be a"),
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
        ("embedding.pooling=cls", "embedding.pooling: got 'cls' (str); input should be 'last', "),
        ("memory.token_budget=0", "memory.token_budget: got 0 (int); input should be greater than"),
        ("memory.token_budget=x", "memory.token_budget: got 'x' (str); input should be 'auto'"),
        ("data.sources=[]", "data.sources: got [] (list); list should have at least 1 item"),
        ("data={}", "data.sources: missing, and it has no default"),
        ("data.sources=[{}]", "data.sources.0.path: missing, and it has no default"),
    ],
)
def test_wrong_value(override: str, line: str, write: Write) -> None:
    path = write()
    lines = refusal(path, override).splitlines()
    assert any(one.startswith(f"{path}: {line}") for one in lines), lines


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


def test_missing_data(write: Write) -> None:
    path = write("model: {id: x}\n")
    assert refusal(path) == f"{path}: data: missing, and it has no default"


def test_long_values_are_cut(write: Write) -> None:
    (line,) = refusal(write(), f"train.seed={'x' * 500}").splitlines()
    assert "'xxx" in line
    assert "x..." in line
    assert "x" * 100 not in line


def test_everything_wrong_is_told_at_once(write: Write) -> None:
    path = write()
    message = refusal(path, "train.stesp=1", "lora.rank=0", "model.id=3")
    assert [line.removeprefix(f"{path}: ").split(":")[0] for line in message.splitlines()] == [
        "model.id",
        "lora.rank",
        "train.stesp",
    ]


def test_epochs_and_steps_both(write: Write) -> None:
    path = write()
    assert refusal(path, "train.epochs=2", "train.steps=3") == (
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
