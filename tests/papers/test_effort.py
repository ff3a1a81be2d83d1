"""Estimates of stages, and what hours have room for."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem_cft.papers import effort
from lowmem_cft.papers.records import StageRecord
from reproducing import Ask, shorten
from running import Heard


def test_hours_cut_what_can_be_cut(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, rows=80_000, ablation_steps=500)
    whole = sum(estimate.effort.flops for estimate in ask().estimates())
    rate = whole / (10 * 3600)  # the whole run takes ten hours
    rates = dict.fromkeys(("evaluate", "train", "search", "transfer"), rate)
    monkeypatch.setattr(effort.Efforts, "rates", lambda self, records: rates)
    run = ask(hours=4.0)
    assert sum(estimate.hours for estimate in run.estimates()) == pytest.approx(4.0, rel=0.01)
    ours, published = run.share.training_steps
    assert published == 10_000
    assert 3_900 < ours < 4_000
    ablation = run.share.ablation_steps
    assert ablation is not None
    assert ablation[0] / ablation[1] == pytest.approx(ours / published, rel=0.01)
    assert f"{ours:,} of the paper's 10,000" in run.share.describe()
    assert any(f"has {ours:,} of 10,000 steps" in said for said in run.departures())
    ask(stages=["data"], hours=4.0).run(Heard())
    recipe = {stage.name: stage for stage in run.stages}["train"].inputs()["recipe"]
    assert recipe["train"]["warmup_steps"] == round(100 * ours / published)
    with pytest.raises(ValueError, match=r"most of it evaluation; give more hours"):
        _ = ask(folder="other", hours=1e-6).share
    assert ask(folder="other", hours=400.0).share.training_steps == (10_000, 10_000)


def test_the_share_stays_as_it_was_begun(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, rows=80_000, ablation_steps=2)
    rates = dict.fromkeys(("evaluate", "train", "search", "transfer"), 1e12)
    monkeypatch.setattr(effort.Efforts, "rates", lambda self, records: rates)
    whole = sum(estimate.hours for estimate in ask().estimates())
    run = ask(hours=whole / 2, stages=["data"])
    run.run(Heard())
    share = run.share
    assert share.training_steps[0] < share.training_steps[1]
    rates.update(train=5e11)
    assert ask(hours=whole / 2).share == share


def test_rates_are_those_of_stages_that_are_done(ask: Ask) -> None:
    efforts = effort.Efforts(ask().request.recipe())
    measured = efforts.rates([])
    assert set(measured.values()) == {measured["train"]}
    assert measured["train"] > 1e6
    done = [
        StageRecord[Any].model_construct(kind="train", flops=flops, seconds=seconds)
        for flops, seconds in ((6e9, 2.0), (0.0, 1.0))
    ]
    assert efforts.rates(done)["train"] == pytest.approx(2e9)
    assert efforts.rates(done)["evaluate"] == measured["evaluate"]
