"""From a file or a preset's name, with overrides, to a checked recipe, and back to YAML."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lowmem_cft.recipe.errors import RecipeError, explain, shortened
from lowmem_cft.recipe.schema import Recipe
from lowmem_cft.recipe.strict_yaml import dump_yaml, parse_yaml

PRESETS = resources.files("lowmem_cft") / "recipe" / "presets"


def preset_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    files = (entry.name for entry in PRESETS.iterdir())
    return sorted(name[:-5] for name in files if name.endswith(".yaml") and name[0] != "_")


def preset_description(name: str) -> str:
    """What a preset is for, in a clause: its model, and the first words of what it extends."""
    values, base = parse_yaml((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), name), name
    model = values["model"]["id"]
    while (parent := values.get("extends")) is not None:
        base = parent
        values = parse_yaml((PRESETS / f"{base}.yaml").read_text(encoding="utf-8"), base)
    comment = (PRESETS / f"{base}.yaml").read_text(encoding="utf-8").removeprefix("# ")
    purpose = re.split(r"[,;]|\.\s", comment, maxsplit=1)[0]
    return f"{model}: {purpose}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as text: {error}") from error


def _read(
    name: str, relative_to: Path | None = None, chain: tuple[str, ...] = ()
) -> tuple[dict[str, Any], str]:
    """The merged values of a recipe and where it lies; `chain` names those that extend it."""
    path = Path(name) if relative_to is None else relative_to / name
    # a preset extends a preset, whatever lies in the working folder
    if path.is_file() and (relative_to is not None or not chain):
        text, where, folder = _read_text(path), str(path), path.parent
        key = str(path.resolve())
    elif "/" not in name and (PRESETS / f"{name}.yaml").is_file():
        text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
        where, folder = f"preset {name}", None
        key = where
    else:
        close = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise RecipeError(
            f"{name}: no such recipe file, and no preset of that name{hint}; "
            f"presets: {', '.join(preset_names())}" + (f"; {chain[-1]} extends it" if chain else "")
        )
    if key in chain:
        raise RecipeError(
            f"{chain[-1]}: extends: got {name!r}, which leads back to itself "
            f"({' -> '.join((*chain, key))}), wanted a chain that ends"
        )
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: got {type(values).__name__}, wanted sections such as `model:`")
    base = values.pop("extends", None)
    if base is None:
        return values, where
    if not isinstance(base, str):
        raise RecipeError(f"{where}: extends: got {base!r}, wanted another recipe's name")
    return merge(_read(base, folder, (*chain, key))[0], values), where


_ONE_OF = ("epochs", "steps")
"""Keys of which a section holds one: each replaces the other."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` put over it, mappings merged key by key.

    Steps replace epochs, and epochs steps: a recipe has one of them.
    """
    merged = dict(base)
    for key, other in (_ONE_OF, _ONE_OF[::-1]):
        if over.get(key) is not None and over.get(other) is None:
            merged.pop(other, None)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(typing.cast("Mapping[str, Any]", old), value) if both else value
    return merged


_TEMPLATES = ("text.template", "text.document_template")


def _template(text: str) -> str | None:
    """A template as it is written; None for a value in quotes, or null."""
    bare = text.strip()
    in_quotes = bare[:1] in ("'", '"') and bare[-1:] == bare[:1]
    return None if in_quotes or bare == "null" else text


def apply_override(values: dict[str, Any], assignment: str) -> None:
    """Set `a.b=c` in place; c is read as YAML, numbers index lists.

    A template is taken as it is written, if it stands in no quotes: its braces, quotes and colons
    mean something in YAML.

    Raises:
        RecipeError: no `=`, or the path runs through something that is no section or list.
    """
    path, sign, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise RecipeError(f"`overrides` {assignment}: wanted SECTION.KEY=VALUE, as train.steps=100")
    value = _template(text) if path.strip() in _TEMPLATES else None
    if value is None:
        value = parse_yaml(text, f"`overrides` {assignment}")
    here: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list) and key.isdecimal() and int(key) < len(here):
            slot: int | str = int(key)
        elif isinstance(here, dict):
            slot = key
        else:
            got = ".".join(keys[:depth])
            raise RecipeError(f"`overrides` {assignment}: {got} has no {key!r} to set")
        if last:
            here[slot] = value
            if keys[:-1] == ["train"] and key in _ONE_OF and value is not None:
                here.pop(_ONE_OF[1 - _ONE_OF.index(key)], None)
        elif isinstance(here, list):
            here = here[int(slot)]
        else:
            here = here.setdefault(slot, {})


def parse_recipe(values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check raw values.

    Args:
        source: where they stand, for the messages.
        overrides: assignments among them; what is wrong with one is said of it.

    Raises:
        RecipeError: everything that is wrong, a line each.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(
            f"{_origin(key, source, overrides)}: {reason}"
            for key, reason in map(explain, error.errors())
        )
        raise RecipeError("\n".join(lines)) from None


def _origin(key: str, source: str, overrides: Sequence[str]) -> str:
    """Where a key was set: by the last override of it or of what holds it, else in the source."""
    for assignment in reversed(overrides):
        path = assignment.partition("=")[0].strip()
        if f"{key}.".startswith(f"{path}."):
            override = f"`overrides` {shortened(assignment)}"
            return override if key == path else f"{override}: {key}"
    return f"{source}: {key}"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file or preset, apply overrides, check it.

    Raises:
        RecipeError: nothing of that name, not YAML, or values that do not pass.
    """
    values, where = _read(name)
    for assignment in overrides:
        apply_override(values, assignment)
    recipe = parse_recipe(values, where, overrides)
    if recipe.output.name is None:
        recipe = recipe.with_values("output", name=Path(name).name.removesuffix(".yaml"))
    return recipe


def parse_saved(values: Mapping[str, Any], source: str) -> Recipe:
    """Check the values of a recipe that was saved with a run or an export.

    Those that an older version did not know get the meaning that they had there.

    Raises:
        RecipeError: everything that is wrong, a line each.
    """
    recipe = parse_recipe(values, source)
    if "tail" not in values.get("text", {}) and recipe.text.has_tail:
        recipe = recipe.with_values("text", tail="joined")
    return recipe


def load_saved(path: Path) -> Recipe:
    """The recipe that a run's folder holds; see `parse_saved`.

    Raises:
        RecipeError: it cannot be read, or is no recipe.
    """
    return parse_saved(_read(str(path))[0], str(path))


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, readable by `load_recipe`."""
    values = recipe.model_dump(mode="json")
    return dump_yaml(values)
