"""The command line as a user meets it: results, and one clear message for each mistake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowmem_cft import __version__
from lowmem_cft.cli import app as cli
from places import ROOT
from running import Run


def test_version_and_help(command: Run) -> None:
    assert command("--version")[:2] == (0, f"{__version__}\n")
    code, out, _ = command("--help")
    assert code == 0
    for name in ("train", "demo", "eval", "export", "embed", "doctor", "recipes"):
        assert name in out


def test_the_commands_are_frozen() -> None:
    """A command that appears or goes is seen in review."""
    names = {c.name for c in cli.app.registered_commands}
    assert names == {
        "train",
        "demo",
        "eval",
        "compare",
        "export",
        "embed",
        "doctor",
        "plan",
        "recipes",
        "icl-search",
        "reproduce",
    }


def test_base_model_is_evaluated_too(command: Run, tiny_folder: Path) -> None:
    code, out, err = command(
        "eval", str(tiny_folder), "-s", "demo", "--set", "embedding.pooling=mean"
    )
    assert code == 0, err
    assert "demo" in out


MISTAKES = (
    "unknown key",
    "missing data",
    "empty data",
    "batch larger than the data",
    "unknown model",
    "unknown set",
    "paged optimizer without CUDA",
)


def broken_file(folder: Path, text: str) -> str:
    path = folder / "bad.jsonl"
    path.write_text(text)
    return f"data.sources=[{{path: {path}}}]"


def mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
    """What is set wrong, and what the message must name."""
    return {
        "unknown key": (["train.lerning_rate=1"], "did you mean learning_rate?"),
        "missing data": (["data.sources=[{path: ./gone.jsonl}]"], "gone.jsonl"),
        "empty data": ([broken_file(folder, "")], "bad.jsonl"),
        "batch larger than the data": (["train.logical_batch=1000"], "only 40 rows"),
        "unknown model": (["model.id=nobody/nothing"], "nobody/nothing"),
        "unknown set": (["eval.sets=[STS99]"], "STS99"),
        "paged optimizer without CUDA": (["train.optimizer=paged_adamw_8bit"], "adamw"),
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_recipe(command: Run, recipe_file: Path, tmp_path: Path, name: str) -> None:
    settings, named = mistakes(tmp_path)[name]
    options = [part for setting in settings for part in ("--set", setting)]
    code, _, err = command("train", str(recipe_file), *options)
    assert code == 2, err
    assert named in err.replace("\n", " ")
    assert not (tmp_path / "runs" / "tiny").exists()


def test_bad_row_names_file_line_and_column(
    command: Run, recipe_file: Path, tmp_path: Path
) -> None:
    rows = '{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": ""}\n'
    code, _, err = command("train", str(recipe_file), "--set", broken_file(tmp_path, rows))
    assert code == 2
    for part in ("bad.jsonl", "line 2", "positive", "on_bad_row"):
        assert part in err


def test_model_without_a_tokenizer(
    command: Run, recipe_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, folder)
    code, _, err = command("train", str(recipe_file), "--set", f"model.id={folder}")
    assert code == 2
    assert "tokenizer" in err


LIMIT = ("--memory", "12GiB")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "no-such-recipe"], "presets"),
        (["train", "demo", "--resume", "--overwrite"], "choose one"),
        (["plan", "demo", *LIMIT, "--set", "model.id=./gone"], "./gone does not exist"),
        (["plan", "demo", *LIMIT, "--set", "model.id=tests"], "holds no config.json"),
        (["plan", "demo", *LIMIT, "--set", "model.id=a b/c"], "neither a local folder nor"),
        (["plan", "demo", *LIMIT, "--set", "model.id=nobody/nothing"], "cannot be reached"),
        (["reproduce", "cft", "--model", "phi-2", "--out", "Makefile"], "is a file, wanted a"),
        (["eval", "./no-such-model", "-s", "demo"], "does not exist"),
        (["embed", "model", "no-such-file.txt"], "does not exist"),
        (["embed", "model", "Makefile", "--out", "x.csv"], ".npy or .parquet"),
        (["export", "no-such-run"], "no-such-run does not exist"),
        (["frobnicate"], "frobnicate"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line(
    command: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: str
) -> None:
    monkeypatch.chdir(ROOT)
    code, _, err = command(*arguments)
    assert code == 2
    assert named in err


def test_damaged_files_are_named(command: Run, finished: Path, tmp_path: Path) -> None:
    merged, texts = tmp_path / "merged", tmp_path / "texts.txt"
    texts.write_text("a\n")
    code, _, err = command("export", str(finished), "--merged", "--out", str(merged))
    assert code == 0, err
    for model in (finished, finished / "model", merged):
        assert command("embed", str(model), str(texts))[0] == 0
    damaged = (
        (finished, "recipe.yaml", "model: [", ""),
        (finished, "adapter/adapter_config.json", "{", "again"),
        (finished, "adapter/adapter_model.safetensors", "", "again"),
        (finished / "model", "lowmem_cft.json", "{", "again"),
        (finished / "model", "lowmem_cft.json", '{"kind": "adapter"}', "again"),
        (finished / "model", "adapter_model.safetensors", "junk", "again"),
        (merged, "config.json", "{", "again"),
        (merged, "config.json", "[]", "again"),
        (merged, "model.safetensors", "junk", "again"),
        (merged, "lowmem_cft.json", "{", "again"),
    )
    for model, name, text, way_out in damaged:
        whole = (model / name).read_bytes()
        (model / name).write_text(text)
        code, _, err = command("embed", str(model), str(texts))
        assert code == 2, err
        assert f"error: {model / name}: " in err
        assert way_out in err
        (model / name).write_bytes(whole)


def test_the_machines_faults_exit_with_1(
    command: Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowmem_cft.exporting.layout._write_layout", full)
    code, _, err = command("export", str(finished), "--overwrite")
    assert code == 1
    assert "No space left on device" in err
    assert (finished / "model" / "modules.json").is_file(), "the export before it is gone"


def test_unexpected_faults_point_to_debug(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("lowmem_cft.recipe.load.load_recipe", broken)
    code, _, err = command("train", "demo")
    assert code == 1
    assert "--debug" in err


def test_data_folder_without_sets(
    command: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(tmp_path / "empty"))
    code, _, err = command("eval", str(finished))
    assert code == 2
    assert "holds none of" in err
