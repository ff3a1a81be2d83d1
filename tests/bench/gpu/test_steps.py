"""Steps of real models: sampled, and as much of them as there is time for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import steps
from bench.gpu.options import Options


def test_a_sampled_step_computes_a_part_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss has all rows and is finite; of the texts only the sample is encoded."""
    options = Options(torch.device("cpu"), True, 2**33, 100.0)
    rig = steps.make_rig("MiniCPM-2B", options, "none", 2**33, 1e12)
    results = rig.choose(32)
    results = replace(results, plan=replace(results.plan, backward_tokens=200, kept_tokens=0))
    texts: list[int] = []
    encode = type(rig.encoder).__call__

    def counted(encoder: Any, batch: Any, *args: Any) -> torch.Tensor:
        texts.append(len(batch.ids_BT))
        emb_BD: torch.Tensor = encode(encoder, batch, *args)
        return emb_BD

    monkeypatch.setattr(type(rig.encoder), "__call__", counted)
    whole = steps.run_step(rig, 32, results)
    num_whole = sum(texts)
    texts.clear()
    sampled = steps.run_step(rig, 32, results, 4)
    assert num_whole == 2 * 96
    assert sum(texts) < 0.6 * num_whole
    assert (whole["sampled"], sampled["sampled"]) == (False, True)
    assert whole["seconds_whole"] == whole["seconds"]
    assert 0.1 < sampled["share"] < 0.6
    assert sampled["ok"]
    assert sampled["seconds_whole"] > 1.2 * sampled["seconds"]
    assert sampled["tokens"] == whole["tokens"]
    assert sampled["padding_share"] == whole["padding_share"]


@pytest.mark.parametrize(("seconds", "every"), [(100.0, 1), (43.0, 2), (12.0, 5), (4.0, 198)])
def test_how_much_of_a_step_there_is_time_for(seconds: float, every: int) -> None:
    """A small step of 1 s, 0.01 s of it the loss; one of 20 times the rows and 40 times the work."""

    first = {"rows": 64, "seconds": 1.0, "seconds_by_phase": {"loss": 0.01}}
    small = SimpleNamespace(relative_cost=1.0, padded_tokens=1000)
    large = SimpleNamespace(relative_cost=2.0, padded_tokens=20000)
    assert steps.one_in(first, small, large, 64 * 20, seconds) == every
