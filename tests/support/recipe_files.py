"""The least recipe, and the message with which one is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lowmem_cft.recipe.errors import RecipeError
from lowmem_cft.recipe.load import load_recipe

MINIMAL = "data:\n  sources:\n    - path: rows.csv\n"

Write = Callable[..., str]


def refusal(name: str, *overrides: str) -> str:
    """The message with which a recipe is refused; every line of a check begins with its file."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)
