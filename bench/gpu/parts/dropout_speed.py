"""bench.dropout's comparison, in short rounds."""

from __future__ import annotations

from typing import Any

from bench import dropout
from bench.gpu.options import Options


def check(options: Options) -> dict[str, Any]:
    """The rows of bench.dropout and what they come to."""
    shapes = dropout.SHAPES[:1] if options.tiny else dropout.SHAPES
    rounds, budget = (3, 0.01) if options.tiny else (5, 0.05)
    return {"ok": True, **dropout.measure(options.device, shapes, 0.1, rounds, budget)}
