"""The optimizer and the learning rates."""

from __future__ import annotations

import math

import pytest
import torch

from lowmem_cft.recipe.schema import TrainSection
from lowmem_cft.training.checkpoint import load_state
from lowmem_cft.training.optimizer import make_optimizer, make_scheduler
from running import MakeRecipe, start

CPU = torch.device("cpu")


def test_a_temperature_is_trained_without_decay_or_not_at_all(make_recipe: MakeRecipe) -> None:
    learned = make_recipe(train={"weight_decay": 0.3}, loss={"learn_temperature": True})
    trainer = start(learned)
    assert trainer.job.temperature is not None
    adapter, temperature = trainer.job.optimizer.param_groups
    assert (adapter["weight_decay"], temperature["weight_decay"]) == (0.3, 0.0)
    assert adapter["lr"] == temperature["lr"]
    assert [id(p) for p in temperature["params"]] == [id(trainer.job.temperature.raw)]
    assert [id(p) for p in adapter["params"]] == [id(p) for p in trainer.job.parameters]

    plain = start(make_recipe(train={"weight_decay": 0.3}), overwrite=True)
    assert plain.job.temperature is None
    assert len(plain.job.optimizer.param_groups) == 1
    assert plain.step().temperature is None
    plain.save()
    assert load_state(plain.folder).temperature == {}


def rates(section: TrainSection, num_steps: int) -> list[float]:
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2))], section, CPU)
    scheduler = make_scheduler(optimizer, section, num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_rates_warm_up_and_then_follow_the_schedule() -> None:
    warm_up = {"learning_rate": 1.0, "warmup_steps": 2}
    assert rates(TrainSection(schedule="constant", **warm_up), 5) == [0, 0.5, 1, 1, 1]
    assert rates(TrainSection(schedule="linear", **warm_up), 6) == [0, 0.5, 1, 0.75, 0.5, 0.25]
    cosine = rates(TrainSection(schedule="cosine", **warm_up), 6)
    expected = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert cosine == pytest.approx([0, 0.5, *expected])


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_paged_optimizer_needs_cuda(name: str) -> None:
    section = TrainSection(optimizer=name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"got {name}, which needs a CUDA device; use adamw"):
        make_optimizer([torch.nn.Parameter(torch.zeros(2))], section, CPU)
