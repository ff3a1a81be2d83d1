"""A hub that no network is needed for."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the hub: knows owner/name only, and records what it was asked."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if name == "owner/none":
            raise datasets.exceptions.DatasetNotFoundError("no such data set")
        if name == "owner/cut":
            raise ConnectionError("no network")
        return datasets.Dataset.from_dict({"anchor": ["a"], "positive": ["p"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked
