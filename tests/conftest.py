"""Fixtures: a tiny model in a folder, where real data lie, a cache of the tests' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from peer_models import peer_folder  # noqa: F401
from places import ROOT
from running import command, corpus_files, finished, make_recipe, recipe_file  # noqa: F401
from tiny import save_tiny

_BESIDE = ROOT.parent / "shared" / "data"
if "LOWMEM_CFT_DATA" not in os.environ and _BESIDE.is_dir():
    os.environ["LOWMEM_CFT_DATA"] = str(_BESIDE)
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    given = os.environ.get("LOWMEM_CFT_DATA")
    if not given:
        pytest.skip("LOWMEM_CFT_DATA is not set: no real data here")
    return Path(given)


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("LOWMEM_CFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


_COSTS: dict[str, Any] = {}


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan changes no result, so the costs of the first tiny model serve them all."""
    from lowmem_cft.planning import footprint

    trace = footprint.cost_model

    def remembered(*args: Any, checkpointing: Any, **kwargs: Any) -> Any:
        if checkpointing not in _COSTS:
            _COSTS[checkpointing] = trace(*args, checkpointing=checkpointing, **kwargs)
        return _COSTS[checkpointing]

    monkeypatch.setattr(footprint, "cost_model", remembered)
