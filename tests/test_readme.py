"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowmem_cft.recipe.load import to_yaml
from places import ROOT
from running import MakeRecipe

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


def test_there_are_blocks() -> None:
    assert sum("lc.train" in block for block in BLOCKS) == 1
    assert sum("chunked_gradient" in block for block in BLOCKS) == 1


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs(
    block: str, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with the files that it names; a trained run is there for the block that loads it."""
    if "sentence_transformers" in block:
        pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    output = {"folder": "runs", "name": "mine"}
    recipe = make_recipe(train={"steps": 1}, output=output)
    pairs = Path(recipe.eval.sets[0])
    Path("my_scored_pairs.tsv").write_text(pairs.read_text())
    Path("mine.yaml").write_text(to_yaml(recipe))
    if "lc.train" not in block:
        import lowmem_cft as lc

        lc.train(recipe)
    names: dict[str, object] = {}
    exec(block, names)
    if "vectors" in names:
        assert len(names["vectors"]) == 2  # type: ignore[arg-type]
    if "step" in names:
        assert names["encoder"].weight.grad is not None  # type: ignore[attr-defined]
