"""Checks that do not hold."""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu.checks import Checks
from bench.gpu.options import Options


def test_a_check_that_does_not_hold_is_listed() -> None:
    options = Options(torch.device("cpu"), True, 2**30, 100.0)
    checks = Checks(options)

    def group(_: Any, inner: Any) -> None:
        inner.at_most("kind", "name", float("nan"), 1.0)
        inner.at_most("kind", "other", 0.5, 1.0)
        raise RuntimeError("broken")

    checks.group("a group", group)
    results = checks.to_json()
    assert not results["ok"]
    assert [failed.get("name") for failed in results["failed"]] == ["name", None]
    assert "broken" in results["failed"][1]["error"]
