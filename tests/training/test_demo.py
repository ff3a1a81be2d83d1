"""Which data the demo takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.training import demo


@pytest.fixture
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_hub_answers", lambda: True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with the set and the triplets."""
    for name in ("STSBenchmark/STSBenchmark-dev.tsv", "nli/nli_triplets.tsv.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("hub_answers")
def test_the_data_folder_comes_first(folder: Path) -> None:
    name, overrides = demo.choose_data(offline=False)
    assert name == f"NLI triplets and STSBenchmark-dev in {folder}"
    recipe = load_recipe("demo", overrides)
    (source,) = recipe.data.sources
    assert source.path == str(folder / "nli" / "nli_triplets.tsv.gz")
    assert source.where == {"in_eval": "0"}
    assert recipe.eval.sets == ["STSBenchmark-dev"]


@pytest.mark.usefixtures("hub_answers")
def test_then_the_hub_and_then_the_embedded_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWMEM_CFT_DATA", raising=False)
    name, overrides = demo.choose_data(offline=False)
    assert name == "NLI triplets and STS-B dev from the hub"
    assert load_recipe("demo", overrides).data.sources[0].limit == 20000
    assert demo.choose_data(offline=True) == ("the embedded triplets and pairs", [])


@pytest.mark.usefixtures("hub_answers")
def test_a_folder_without_triplets_leaves_them_to_the_hub(folder: Path) -> None:
    (folder / "nli" / "nli_triplets.tsv.gz").unlink()
    assert demo.choose_data(offline=False)[0] == "NLI triplets and STS-B dev from the hub"
