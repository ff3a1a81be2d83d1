"""The memory part: what is skipped, and what is not begun."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu.options import Options
from bench.gpu.parts import memory


def test_without_4_bit_weights_16_bit_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, str]] = []

    def tried(name: str, options: Any, quantization: str, *rest: Any) -> dict[str, Any]:
        taken.append((name, quantization))
        return {"ok": True}

    monkeypatch.setattr(memory, "try_model", tried)
    monkeypatch.setattr(memory, "loss_phases", lambda options, results: [])
    options = Options(torch.device("cpu"), True, 2**30, 100.0, models=("Phi-2",))
    for reason, quantization in {"not installed": "none", None: "nf4"}.items():
        monkeypatch.setattr(memory, "no_nf4", lambda options, reason=reason: reason)
        assert memory.check(options)["no_nf4"] == reason
        assert taken[-1] == ("Phi-2", quantization)


def test_a_16_bit_model_that_does_not_fit_is_skipped() -> None:
    options = Options(torch.device("cpu"), True, 2**30, 100.0)
    results = memory.try_model("MiniCPM-2B", options, "none", 2**20, 1e12)
    assert results["ok"]
    assert "does not fit" in results["skipped"]
    with pytest.raises(ValueError, match="does not fit"):
        memory.try_model("MiniCPM-2B", options, "nf4", 2**20, 1e12)


def test_a_loss_phase_that_would_take_too_long_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card on which the first takes 40 s and each of the others 70 s."""
    options = Options(torch.device("cpu"), False, 2**30, 60.0)
    asked: list[tuple[int, int]] = []

    def measured(options: Any, rows: int, dim: int, workspace_bytes: int) -> dict[str, Any]:
        asked.append((rows, dim))
        return {"ok": True, "tflops": 3.0}

    monkeypatch.setattr(memory, "measure_loss", measured)
    results = memory.loss_phases(options, {"models": {}})
    assert asked == [(4096, 2304), (4096, 2304), (65536, 2304)]
    assert [("skipped" in phase, phase["ok"]) for phase in results] == [
        (False, True),
        (True, True),
        (True, True),
    ]
    assert options.noted == {"models": {}, "loss_phase": results}
