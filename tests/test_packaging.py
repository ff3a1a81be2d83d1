"""What must stay true of the layout: `kernels/` is no package, and a wheel holds everything."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from places import ROOT


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert (ROOT / "kernels" / "lowmem_cft_kernels" / "__init__.py").is_file()
    assert not list((ROOT / "kernels").glob("*.py"))
    found = importlib.util.find_spec("kernels")
    # A namespace candidate has no origin; a regular package of that name is not ours.
    assert found is None or found.origin is None or ROOT not in Path(found.origin).parents


def test_wheel_holds_both_packages_recipes_and_data(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the wheel is built without a network")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "lowmem_cft/cli/app.py",
        "lowmem_cft/py.typed",
        "lowmem_cft/recipe/presets/demo.yaml",
        "lowmem_cft/data/embedded/triplets.jsonl",
        "lowmem_cft/data/embedded/sts_pairs.tsv",
        "lowmem_cft/evaluation/search/demonstrations.tsv",
        "lowmem_cft/papers/published.yaml",
        "lowmem_cft/papers/report/report.md.j2",
        "lowmem_cft/data/embedded/README.md",
        "lowmem_cft_kernels/__init__.py",
        "lowmem_cft_kernels/py.typed",
    ):
        assert name in names, name
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "lowmem_cft",
        "lowmem_cft_kernels",
    }


def test_nothing_heavy_is_imported_for_help() -> None:
    code = (
        "import sys; import lowmem_cft.cli.app;"
        "print([m for m in ('torch', 'transformers', 'peft', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
