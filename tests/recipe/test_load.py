"""From a file or a preset's name, with overrides, to a recipe and back, or why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem_cft.recipe.errors import RecipeError
from lowmem_cft.recipe.load import (
    apply_override,
    load_recipe,
    merge,
    parse_recipe,
    preset_names,
    to_yaml,
)
from recipe_files import MINIMAL, Write, refusal


@pytest.mark.parametrize(
    ("written", "template"),
    [
        ("{text}", "{text}"),
        (
            'This sentence : "{text}" means in one word:"',
            'This sentence : "{text}" means in one word:"',
        ),
        ("query: {text}", "query: {text}"),
        ("'{a} {text}'", "{a} {text}"),
        (r'"line\n{text}"', "line\n{text}"),
    ],
)
def test_a_template_is_taken_as_it_is_written(written: str, template: str) -> None:
    assert load_recipe("demo", [f"text.template={written}"]).text.template == template
    text = load_recipe("demo", [f"text.document_template={written}"]).text
    assert text.document_template == template
    assert load_recipe("demo", ["text.document_template=null"]).text.document_template is None


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
    assert message.startswith("`overrides` train.stesp=3: unknown key (did you mean steps?)")


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


@pytest.mark.parametrize("name", preset_names())
def test_preset_round_trips(name: str, write: Write) -> None:
    recipe = load_recipe(name)
    assert recipe.output.name == name
    text = to_yaml(recipe)
    assert load_recipe(write(text)) == recipe
    assert parse_recipe(yaml.safe_load(text), "saved") == recipe  # plain YAML 1.1 reads it too


@pytest.mark.parametrize("word", ["on", "true", "yes", "off", "false", "no", "True", "OFF"])
@pytest.mark.parametrize("quote", ["", "'"])
def test_words_for_true_and_false_mean_that_everywhere(word: str, quote: str) -> None:
    means = word.lower() in ("on", "true", "yes")
    recipe = load_recipe(
        "demo",
        [
            f"memory.keep_graphs={quote}{word}{quote}",
            f"memory.checkpointing={quote}{word}{quote}",
            f"memory.offload_embeddings={quote}{word}{quote}",
            f"embedding.normalize={quote}{word}{quote}",
            f"lora.rslora={quote}{word}{quote}",
        ],
    )
    switch = "on" if means else "off"
    assert recipe.memory.keep_graphs == recipe.memory.checkpointing == switch
    assert recipe.memory.offload_embeddings == switch
    assert recipe.embedding.normalize is recipe.lora.rslora is means


def test_checkpointing_may_also_be_a_number() -> None:
    assert load_recipe("demo", ["memory.checkpointing=3"]).memory.checkpointing == 3
    with pytest.raises(RecipeError, match=r"memory.checkpointing=0: got 0 \(int\)"):
        load_recipe("demo", ["memory.checkpointing=0"])


def test_steps_replace_epochs_and_epochs_steps(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\ntrain: {steps: null, epochs: 2}\n")
    assert load_recipe(str(file)).train.epochs == 2
    train = load_recipe(str(file), ["train.steps=3"]).train
    assert (train.steps, train.epochs) == (3, None)
    train = load_recipe("demo", ["train.epochs=0.5"]).train
    assert (train.steps, train.epochs) == (None, 0.5)
    further = tmp_path / "further.yaml"
    further.write_text(f"extends: {file}\ntrain: {{steps: 7}}\n")
    train = load_recipe(str(further)).train
    assert (train.steps, train.epochs) == (7, None)
    with pytest.raises(RecipeError, match=r"got epochs: 2\.0 and steps: 3, wanted one of them"):
        load_recipe("demo", ["train={epochs: 2, steps: 3}"])


@pytest.mark.parametrize("limit", ["12", "'12'", "11.5"])
def test_an_amount_of_memory_has_a_unit(limit: str) -> None:
    number = limit.strip("'")
    with pytest.raises(RecipeError, match=rf"got '{number}' without a unit, .*such as {number}GiB"):
        load_recipe("demo", [f"memory.limit={limit}"])
