"""Recipe files of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipe_files import MINIMAL, Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe file, by default one that passes, and return its path."""

    def write_file(text: str = MINIMAL, name: str = "my.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file
