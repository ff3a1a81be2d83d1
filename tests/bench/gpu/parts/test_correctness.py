"""The correctness part without 4-bit weights."""

from __future__ import annotations

import pytest
import torch

from bench.gpu.checks import Checks
from bench.gpu.options import Options
from bench.gpu.parts import correctness


def test_plans_on_4_bit_weights_are_skipped_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(Options(torch.device("cpu"), True, 2**30, 100.0))
    monkeypatch.setattr(correctness, "no_nf4", lambda options: "not installed")
    correctness.check_nf4(checks.options, checks)
    assert checks.to_json()["skipped"] == {"nf4": "not installed"}
