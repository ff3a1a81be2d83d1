"""Local models that do not exist are told from names that the hub has to be asked of."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.model.names import check_model_name


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("trained/mine/recipe.yaml", "Qwen/Qwen3-8B/config.json", "small.gguf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "./nope",
        "/nowhere/at/all",
        "~/no-such-model",
        "a/b/c",
        "smal.gguf",
        "trained/mien",
        "runs/nope",
        "",
        " ",
    ],
)
def test_what_can_only_be_local_and_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="does not exist; n"):
        check_model_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "trained/mine",
        "./trained/mine",
        "small.gguf",
        "smollm2-135m",
        "gpt2",
        "Qwen/Qwen3-0.6B",
        "sentence-transformers/all-MiniLM-L6-v2",
    ],
)
def test_what_is_there_or_may_be_on_the_hub(name: str) -> None:
    check_model_name(name)


def test_the_nearest_names_are_told() -> None:
    with pytest.raises(
        ValueError, match=r"^trained/mien does not exist; nearest in trained: mine$"
    ):
        check_model_name("trained/mien")
    with pytest.raises(ValueError, match=r"^nix/a/b does not exist; nor does its folder nix/a$"):
        check_model_name("nix/a/b")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="is a file, wanted a model's folder"):
        check_model_name(str(file))
