"""What is wrong with a recipe, said with the key, what was got and what was wanted."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel

from lowmem_cft.recipe.schema import Recipe


class RecipeError(ValueError):
    """The recipe is wrong: the message names each path, what was got and what is allowed."""


def _section_at(location: Sequence[int | str]) -> type[BaseModel] | None:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        known = isinstance(model, type) and issubclass(model, BaseModel)
        field = model.model_fields.get(part) if known else None
        if field is None:
            return None
        model = field.annotation
        while typing.get_origin(model) in (list, typing.Union, types.UnionType, Annotated):
            model = typing.get_args(model)[0]
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


_BRANCHES = {
    "string_type": "str",
    "bool_type": "bool",
    "int_type": "int",
    "float_type": "float",
}
"""Types of pydantic's errors, and what the tried branch of a union adds to their place."""


def shortened(text: str) -> str:
    """The text, or its first 77 characters and three dots."""
    return text if len(text) < 80 else f"{text[:77]}..."


def _suggestion(key: str, section: type[BaseModel] | None) -> str:
    """The known key that is most like an unknown one: of its section, or of another one."""
    allowed = list(section.model_fields) if section else []
    if close := difflib.get_close_matches(key, allowed, n=1):
        return close[0]
    sections = {name: _section_at([name]) for name in Recipe.model_fields}
    elsewhere = {
        field: f"{name}.{field}"
        for name, model in sections.items()
        if model is not None
        for field in model.model_fields
    }
    close = difflib.get_close_matches(key, elsewhere, n=1)
    return elsewhere[close[0]] if close else ""


def explain(error: Any) -> tuple[str, str]:
    """One of pydantic's errors: its dotted key, and what was got there and what is allowed."""
    unknown = error["type"] == "extra_forbidden"
    # pydantic puts the tried branch of a union into the path: 'list[str]', 'constrained-int'
    location = [
        part
        for depth, part in enumerate(error["loc"])
        if isinstance(part, int)
        or part.isidentifier()
        or (unknown and depth == len(error["loc"]) - 1)
    ]
    if error["type"] in _BRANCHES and location[-1:] == [_BRANCHES[error["type"]]]:
        location.pop()
    path = ".".join(str(part) for part in location) or "recipe"
    if unknown:
        section = _section_at(location[:-1])
        allowed = ", ".join(section.model_fields if section else [])
        meant = _suggestion(str(location[-1]), section)
        hint = f" (did you mean {meant}?)" if meant else ""
        return path, f"unknown key{hint}; allowed: {allowed}"
    if error["type"] == "missing":
        return path, "missing, and it has no default"
    if error["type"] == "value_error":
        return path, str(error["ctx"]["error"])
    got = shortened(repr(error["input"]))
    wanted = error["msg"][0].lower() + error["msg"][1:]
    return path, f"got {got} ({type(error['input']).__name__}); {wanted}"
