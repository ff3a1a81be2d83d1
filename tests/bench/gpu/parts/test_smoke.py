"""The smoke test's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu.checks import Checks
from bench.gpu.options import Options
from bench.gpu.parts import smoke


def test_wrong_4_bit_layers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(torch.device("cpu"), True, 2**30, 100.0)
    checks = Checks(options)
    real = smoke.four_bit

    def scaled(*args: Any) -> Any:
        layer = real(*args)
        forward = layer.forward
        layer.forward = lambda x: forward(x) * 1.001
        return layer

    smoke.check_nf4(options, checks)
    assert not checks.failed
    monkeypatch.setattr(smoke, "four_bit", scaled)
    smoke.check_nf4(options, checks)
    assert {failed["name"].partition(",")[0] for failed in checks.failed} == {"result", "gradient"}
