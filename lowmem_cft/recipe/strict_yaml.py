"""YAML in which a number is what it looks like, and a key stands once.

YAML 1.1, which PyYAML reads, takes 010 for 8, 1:30 for 90, 1_000 for 1000 and 1e-4 for a text, and
the last of two equal keys without a word. 1e-4 is a number here; the others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from lowmem_cft.recipe.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses what it would read in another way than people do."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text such as 1e4, which `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )


def _surprise(text: str) -> str | None:
    """What YAML 1.1 makes of the number that nobody expects; None where it is what it looks like."""
    digits = text.lstrip("+-")
    if ":" in digits:
        return "a number to the base 60"
    if "_" in digits:
        return "a number without the underscores"
    if re.fullmatch(r"0[0-7]+", digits):
        return f"the octal number {int(digits, 8)}"
    return None


def _plainly(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def constructed(loader: _Loader, node: yaml.ScalarNode) -> Any:
        if surprise := _surprise(node.value):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"got {node.value}, which YAML reads as {surprise}; write the number without it, or "
                "the text in quotes",
                node.start_mark,
            )
        return construct(loader, node)

    return constructed


def _without_repeats(loader: _Loader, node: yaml.MappingNode) -> Any:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"got the key {key.value!r} twice, wanted it once", key.start_mark
                )
            seen.add(key.value)
    return yaml.SafeLoader.construct_yaml_map(loader, node)


_Loader.add_constructor("tag:yaml.org,2002:int", _plainly(yaml.SafeLoader.construct_yaml_int))
_Loader.add_constructor("tag:yaml.org,2002:float", _plainly(yaml.SafeLoader.construct_yaml_float))
_Loader.add_constructor("tag:yaml.org,2002:map", _without_repeats)


def parse_yaml(text: str, source: str) -> Any:
    """The values of a YAML document.

    Args:
        source: where the text stands, for the message.

    Raises:
        RecipeError: it is not YAML, a number is not what it looks like, or a key stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise RecipeError(f"{source}: not readable as YAML: {error}") from error


def dump_yaml(values: Any) -> str:
    """YAML that `parse_yaml` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
