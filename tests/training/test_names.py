"""What a recipe names is looked for first, and by the recipe's key."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.training.names import check_names
from lowmem_cft.training.pipeline import run_recipe
from running import MakeRecipe, Silent


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"id": "./nowhere"}}, r"model\.id: \./nowhere does not exist; nearest"),
        (
            {"data": {"sources": [{"path": "demo"}, {"path": "rows.jsn.gz/x.jsonl"}]}},
            r"data\.sources\.1\.path: .*not exist",
        ),
        (
            {"eval": {"sets": ["demo", "STSBenchmark-dve"]}},
            r"eval\.sets\.1: .*did you mean STSBenchmark-dev\?",
        ),
        (
            {"eval": {"sets": ["pairs.txs"]}},
            r"eval\.sets\.0: eval set 'pairs\.txs': no such file \(nearest in",
        ),
    ],
)
def test_what_is_not_there_is_told_with_its_key(
    make_recipe: MakeRecipe, sections: dict[str, dict[str, object]], said: str
) -> None:
    recipe = make_recipe(**sections)
    with pytest.raises(ValueError, match=said):
        check_names(recipe)
    with pytest.raises(ValueError, match=said):
        run_recipe(recipe, Silent())
    assert not (Path(recipe.output.folder) / "tiny").exists()


def test_what_is_there_passes(make_recipe: MakeRecipe) -> None:
    check_names(make_recipe())
    check_names(make_recipe(data={"sources": [{"path": "all-nli:triplet"}]}))
    check_names(make_recipe(data={"sources": [{"path": "gone.jsonl"}]}), rows_in_memory=True)
