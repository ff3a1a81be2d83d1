"""Where things belong: tests mirror the package, and imports between packages go downwards only."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from places import ROOT

TESTS = ROOT / "tests"
SOURCES = {"kernels": ROOT / "kernels" / "lowmem_cft_kernels", "bench": ROOT / "bench"}

WHOLE_PROJECT = {"test_imports", "test_layout", "test_old_files", "test_packaging", "test_readme"}


def modules() -> set[Path]:
    """Every module of the package, without its suffix, relative to it."""
    folder = ROOT / "lowmem_cft"
    files = (file.relative_to(folder) for file in folder.rglob("*.py"))
    return {file.with_suffix("") for file in files if file.name != "__init__.py"}


def sources_of(test: Path) -> list[Path]:
    """The modules that a test file may be named after."""
    folder = test.relative_to(TESTS).parent
    top = folder.parts[0] if folder.parts else ""
    if top == "support":
        return list((TESTS / folder).glob("*.py"))
    if top in SOURCES:
        return list((SOURCES[top] / Path(*folder.parts[1:])).glob("*.py"))
    # a folder of data has its tests where its modules have theirs
    return list((ROOT / "lowmem_cft" / folder).glob("*"))


@pytest.mark.parametrize(
    "test", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS))
)
def test_a_test_is_named_after_what_it_tests(test: Path) -> None:
    """`lowmem_cft/a/b.py` is tested by `tests/a/test_b.py`, or by several that begin so."""
    if test.parent == TESTS and test.stem in WHOLE_PROJECT:
        return
    name = test.stem.removeprefix("test_")
    stems = {source.stem for source in sources_of(test)}
    assert any(name == stem or name.startswith(f"{stem}_") for stem in stems), sorted(stems)


def test_every_module_has_a_test() -> None:
    untested = {
        module
        for module in modules()
        if not list((TESTS / module.parent).glob(f"test_{module.name}.py"))
        and not list((TESTS / module.parent).glob(f"test_{module.name}_*.py"))
    }
    assert not untested, "a module without a test of its name"


def test_every_package_says_what_is_in_it() -> None:
    for file in (ROOT / "lowmem_cft").rglob("__init__.py"):
        said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        assert said.partition("\n")[0].endswith("."), file
        if file.parent.name == "lowmem_cft":
            continue
        words = {line.split()[0] for line in said.splitlines()[2:] if line.strip()}
        inside = {
            entry.stem if entry.is_file() else f"{entry.name}/"
            for entry in file.parent.iterdir()
            if (entry.suffix == ".py" and entry.stem != "__init__")
            or (entry.is_dir() and entry.name != "__pycache__")
        }
        assert words == inside, file


def test_an_import_upwards_breaks_the_contract(tmp_path: Path) -> None:
    pytest.importorskip("importlinter")
    for name in ("lowmem_cft", "kernels"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    rows = tmp_path / "lowmem_cft" / "data" / "rows.py"
    rows.write_text(rows.read_text(encoding="utf-8") + "\nimport lowmem_cft.training.trainer\n")
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = ['.', 'kernels']; {command}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "lowmem_cft.data.rows -> lowmem_cft.training.trainer" in done.stdout
