"""YAML values are what they look like, or refused."""

from __future__ import annotations

import pytest

from lowmem_cft.recipe.errors import RecipeError
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.recipe.strict_yaml import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("010", "the octal number 8"),
        ("-07", "the octal number 7"),
        ("1:30", "a number to the base 60"),
        ("1:30.5", "a number to the base 60"),
        ("1_000", "a number without the underscores"),
        ("1_0.5", "a number without the underscores"),
        ("1_0e3", "a number without the underscores"),
    ],
)
@pytest.mark.parametrize("form", ["{}", "a: {}", "[1, {}]", "a: {{b: [{}]}}"])
def test_a_number_that_reads_otherwise_than_it_looks(text: str, said: str, form: str) -> None:
    with pytest.raises(RecipeError, match=f"got {text}, which YAML reads as {said}") as refused:
        parse_yaml(form.format(text), "mine.yaml")
    assert str(refused.value).startswith("mine.yaml: not readable as YAML: ")
    assert "line 1" in str(refused.value)
    quoted = form.format(f"'{text}'")
    assert text in str(parse_yaml(quoted, "mine.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("0", 0), ("-3", -3), ("0.5", 0.5), ("1e-4", 1e-4), ("2E5", 2e5), ("0x1F", 31)],
)
def test_other_numbers_are_read(text: str, value: float) -> None:
    assert parse_yaml(text, "mine.yaml") == value


@pytest.mark.parametrize("text", ["a: 1\na: 2", "b: {a: 1, a: 1}", "[{a: 1, b: 2, a: 3}]"])
def test_a_key_stands_once(text: str) -> None:
    with pytest.raises(RecipeError, match="got the key 'a' twice, wanted it once"):
        parse_yaml(text, "mine.yaml")


def test_what_an_anchor_merges_in_may_be_replaced() -> None:
    values = parse_yaml("a: &base {x: 1, y: 2}\nb: {<<: *base, x: 3}", "mine.yaml")
    assert values["b"] == {"x": 3, "y": 2}


def test_an_override_is_read_alike() -> None:
    with pytest.raises(RecipeError, match=r"`overrides` train.steps=1_000: .*1_000, which YAML"):
        load_recipe("demo", ["train.steps=1_000"])


@pytest.mark.parametrize(
    "value", ["010", "1:30", "1_000", "1e4", "on", "no", "null", 10, 0.1, True]
)
def test_what_is_written_reads_back(value: object) -> None:
    assert parse_yaml(dump_yaml({"a": value}), "mine.yaml") == {"a": value}
