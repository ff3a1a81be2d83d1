"""The part that looks for tiles."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench.gpu.options import Options
from bench.gpu.parts import loss_tiles


def test_tiles_are_reported_beside_the_shipped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(torch.device("cuda", 0), False, 2**30, 60.0)
    second = loss_tiles.tune.CANDIDATES["16-plain"][1]

    def timer(entry: str, tile: Any, size: Any) -> float:
        if entry.startswith("gradient"):
            raise loss_tiles.tune.WrongNumbers("loss is off")
        return 1.0 if tile == second else 2.0

    monkeypatch.setattr(loss_tiles, "capability_of", lambda device: 90)
    monkeypatch.setattr(loss_tiles, "room_bytes", lambda device: 2**30)
    monkeypatch.setattr(loss_tiles.tune, "CallTimer", lambda device, present: timer)
    results = loss_tiles.check(options)
    assert results["ok"]
    assert set(results["entries"]) == set(loss_tiles.TUNED)
    lse = results["entries"]["lse-16-plain"]
    assert lse["best"] != lse["shipped"]
    assert lse["faster_by"] == 2.0
    gradient = results["entries"]["gradient-16-plain"]
    assert gradient["best"] == gradient["shipped"]
    assert gradient["faster_by"] is None
    assert results["left_out"]
    assert options.noted == results
    json.dumps(results)
