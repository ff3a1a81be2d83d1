"""A whole reproduction of the first paper, and its report."""

from __future__ import annotations

import pytest

from fabricated import Fabricated, whole_cft


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    made = whole_cft(tmp_path_factory.mktemp("phi") / "run")
    made.report()
    return made
