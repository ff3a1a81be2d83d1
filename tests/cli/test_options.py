"""Options that several commands take."""

from __future__ import annotations

import os

import pytest

from lowmem_cft.cli.options import go_offline


@pytest.mark.parametrize("offline", [True, False])
def test_offline_is_told_to_the_hubs_libraries(
    monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    go_offline(offline)
    assert os.environ["HF_HUB_OFFLINE"] == ("1" if offline else "")
