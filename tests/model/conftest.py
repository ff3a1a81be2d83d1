"""A tiny model of every supported family in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import FAMILIES, save_tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_tiny(root / family, family) for family in FAMILIES}
