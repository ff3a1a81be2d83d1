"""The recipes that are listed."""

from __future__ import annotations

from lowmem_cft.recipe.load import load_recipe, preset_names
from running import Run


def test_recipes_are_listed_with_their_model_and_purpose(command: Run) -> None:
    code, out, _ = command("recipes")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(lines) == preset_names()
    for name, description in lines.items():
        assert description.startswith(f"{load_recipe(name).model.id}: "), name
    assert lines["cft-phi-2"] == (
        "microsoft/phi-2: Contrastive fine-tuning of small models (arXiv 2408.00690)"
    )
    assert lines["demo"].endswith("The demo: the embedded SmolLM2-135M-Instruct")
