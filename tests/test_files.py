"""A folder is written whole or not at all, and the cache lies where the user says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowmem_cft.files import cache_folder, whole_folder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


def fill(target: Path, **files: str) -> None:
    with whole_folder(target) as partial:
        assert partial != target
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


def test_whole_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with whole_folder(target) as partial:
        (partial / "a").write_text("1", encoding="utf-8")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/target/a": "1"}


def test_whole_folder_replaces(tmp_path: Path) -> None:
    fill(tmp_path / "target", a="1", b="2")
    fill(tmp_path / "target", b="3", c="4")
    assert contents(tmp_path) == {"target/b": "3", "target/c": "4"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True], ids=["new", "existing"])
def test_whole_folder_that_fails(tmp_path: Path, before: bool, error: type[BaseException]) -> None:
    if before:
        fill(tmp_path / "target", a="1")

    def fail() -> None:
        with whole_folder(tmp_path / "target") as partial:
            (partial / "a").write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == ({"target/a": "1"} if before else {})
    assert len(list(tmp_path.iterdir())) == before


def test_whole_folder_keeps_the_target_when_renaming_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "target", a="1")
    real = Path.rename
    refused: list[str] = []

    def rename(self: Path, to: Path) -> Path:
        if self.suffix == ".partial":
            refused.append(self.name)
            raise OSError("no")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"):
        fill(tmp_path / "target", a="2")
    assert refused == [f"target.{os.getpid()}.partial"]
    assert contents(tmp_path) == {"target/a": "1"}
    assert len(list(tmp_path.iterdir())) == 1


def test_whole_folder_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    nobody = 2**22 + 1  # above the greatest process number Linux gives
    for name in (f"target.{nobody}.partial", "target.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("x", encoding="utf-8")
    fill(tmp_path / "target", a="1")
    assert contents(tmp_path) == {"target/a": "1"}
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_CFT_CACHE", str(tmp_path / "given"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "given"
    monkeypatch.delenv("LOWMEM_CFT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "lowmem-cft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "lowmem-cft"
