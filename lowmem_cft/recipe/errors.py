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


def explain(error: Any) -> str:
    """One of pydantic's errors as a line: the key, what was got, what is allowed."""
    unknown = error["type"] == "extra_forbidden"
    # pydantic puts the tried branch of a union into the path: 'list[str]', 'constrained-int'
    location = [
        part
        for depth, part in enumerate(error["loc"])
        if isinstance(part, int)
        or part.isidentifier()
        or (unknown and depth == len(error["loc"]) - 1)
    ]
    path = ".".join(str(part) for part in location) or "recipe"
    if unknown:
        section = _section_at(location[:-1])
        allowed = list(section.model_fields) if section else []
        close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{path}: unknown key{hint}; allowed: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{path}: missing, and it has no default"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}"
    got = repr(error["input"])
    got = got if len(got) < 80 else got[:77] + "..."
    wanted = error["msg"][0].lower() + error["msg"][1:]
    return f"{path}: got {got} ({type(error['input']).__name__}); {wanted}"
