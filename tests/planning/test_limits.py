"""How many bytes a run may take: what is given, what the recipe says, what is free."""

from __future__ import annotations

import pytest
import torch

from lowmem_cft import machine
from lowmem_cft.planning import limits
from lowmem_cft.planning.limits import HEADROOM, MARGINS, plan_limit, run_limit
from lowmem_cft.units import GIB
from measured_steps import make_recipe

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_cpu_with_10_gib_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "choose_device", lambda: CPU)
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10 * GIB)


FREE = int(HEADROOM * 10 * GIB) + MARGINS["cpu"]
AUTO, GIVEN = make_recipe(), make_recipe(memory={"limit": "3GiB"})


def test_what_is_given_goes_before_the_recipe_and_that_before_what_is_free() -> None:
    assert plan_limit(GIVEN, "2GiB", None) == ("cuda", 2 * GIB)
    assert plan_limit(GIVEN, "2GiB", "cpu") == ("cpu", 2 * GIB)
    assert plan_limit(GIVEN, None, None) == ("cpu", 3 * GIB)
    assert plan_limit(GIVEN, None, "cuda") == ("cuda", 3 * GIB)
    assert plan_limit(AUTO, None, None) == plan_limit(AUTO, None, "cpu") == ("cpu", FREE)


def test_what_is_free_on_a_device_that_is_not_here_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"`memory`: wanted a limit, .* has no cuda device"):
        plan_limit(AUTO, None, "cuda")


def test_a_run_takes_no_more_than_is_free() -> None:
    assert run_limit(AUTO, CPU) == FREE
    assert run_limit(GIVEN, CPU) == 3 * GIB
    assert run_limit(make_recipe(memory={"limit": "30GiB"}), CPU) == FREE


def test_the_allocator_is_capped_where_the_recipe_sets_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the limit less what the process holds beside tensors."""
    fractions: list[float] = []

    class Card:
        total_memory = 5 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share)
    )
    card = torch.device("cuda", 0)
    for recipe, device in ((AUTO, card), (GIVEN, CPU), (GIVEN, card)):
        limits.cap_allocator(recipe, device)
    limits.cap_allocator(make_recipe(memory={"limit": "30GiB"}), card)
    assert fractions == [0.5, 1.0]
