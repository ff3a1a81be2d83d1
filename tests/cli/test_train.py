"""The commands that make a model."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from lowmem_cft.recipe.load import parse_recipe
from running import Run


def test_print_config_is_a_recipe(command: Run, recipe_file: Path) -> None:
    code, out, _ = command("train", str(recipe_file), "--print-config", "--set", "train.steps=7")
    assert code == 0
    assert yaml.safe_load(out)["train"]["steps"] == 7
    assert parse_recipe(yaml.safe_load(out), "printed").train.steps == 7


def test_train_eval_embed_export(command: Run, finished: Path, tmp_path: Path) -> None:
    pairs = yaml.safe_load((finished / "recipe.yaml").read_text())["eval"]["sets"][0]
    scores = tmp_path / "scores.json"
    code, out, err = command("eval", str(finished), "-s", pairs, "--out", str(scores))
    assert code == 0, err
    assert "Spearman" in out
    result = json.loads(scores.read_text())
    metrics = json.loads((finished / "metrics.json").read_text())
    wanted = metrics["after"][0]["spearman"]
    assert result["sets"][0]["spearman"] == pytest.approx(wanted, abs=1e-6)
    assert result["protocol"] == metrics["protocol"] == "cosine Spearman over all pairs of the set"

    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat\na dog ran\nthe cat sat\n")
    code, _, err = command("embed", str(finished), str(texts))
    assert code == 0, err
    vectors = np.load(tmp_path / "texts.txt.npy")
    assert vectors.shape == (3, 64)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1])
    table = tmp_path / "vectors.parquet"
    code, _, err = command("embed", str(finished / "model"), str(texts), "--out", str(table))
    assert code == 0, err
    read = pq.read_table(table).to_pydict()
    assert read["text"] == ["the cat sat", "a dog ran", "the cat sat"]
    assert np.allclose(np.array(read["embedding"], dtype=np.float32), vectors, atol=1e-5)

    target = tmp_path / "merged"
    code, _, err = command("export", str(finished), "--merged", "--out", str(target))
    assert code == 0, err
    assert (target / "model.safetensors").is_file()
    assert not (target / "adapter_config.json").exists()


def test_existing_run(command: Run, finished: Path, recipe_file: Path) -> None:
    before = (finished / "metrics.json").read_text()
    code, _, err = command("train", str(recipe_file))
    assert code == 2
    assert "--resume" in err
    assert "--overwrite" in err
    assert (finished / "metrics.json").read_text() == before


def test_export_does_not_touch_a_folder_of_something_else(
    command: Run, finished: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "papers"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    for target in (precious, finished):
        code, _, err = command("export", str(finished), "--out", str(target))
        assert code == 2
        assert "no export of ours" in err
    assert (precious / "thesis.tex").is_file()
    assert (finished / "adapter").is_dir()


class Terminal(StringIO):
    """Standard input of someone who is asked."""

    def isatty(self) -> bool:
        return True


def test_an_export_is_replaced_only_where_that_is_wanted(
    command: Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = finished / "model" / "lowmem_cft.json"
    arguments = ("export", str(finished), "--merged", "--out", str(finished / "model"))
    code, _, err = command(*arguments)
    assert code == 2
    assert "holds an export already: replace it with --overwrite, or choose another" in err
    for answer, kind in (("n", "adapter"), ("y", "merged")):
        monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
        code, _, err = command(*arguments)
        assert code == (0 if answer == "y" else 1), err
        assert json.loads(made.read_text())["kind"] == kind
        assert "holds an export already; replace it?" in err
    monkeypatch.setattr("sys.stdin", StringIO())
    code, _, err = command("export", str(finished), "--overwrite")
    assert code == 0, err
    assert json.loads(made.read_text())["kind"] == "adapter"


def test_demo_ends_in_one_line_of_json(
    command: Run,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a stand-in for the model; `make demo` runs it on the real one."""
    monkeypatch.delenv("LOWMEM_CFT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    options = [f"model.id={tiny_folder}", "model.keep_layers=2", "train.steps=3"]
    arguments = [part for option in options for part in ("--set", option)]
    code, out, err = command("demo", "--offline", *arguments)
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert set(summary) == {"before", "after", "seconds", "peak_bytes", "data", "model"}
    assert -1 <= summary["before"] <= 1
    assert summary["data"] == "the embedded triplets and pairs"
    code, out, err = command("demo", "--offline", *arguments)
    assert code == 0, "the demo runs again where it ran before"
