"""Reads and writes beyond the bounds are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gpu import sanitized


@pytest.mark.parametrize("breach", ["read", "write"])
def test_what_is_beyond_the_bounds_is_seen(monkeypatch: pytest.MonkeyPatch, breach: str) -> None:
    cpu = torch.device("cpu")
    sanitized.check(frozenset(), torch.float32, cpu)
    run = type(sanitized.make_case(frozenset(), (4, 8, 8))).run

    def beyond(case: Any, path: Any, **more: Any) -> Any:
        result = run(case, path, **more)
        if "out" in more and breach == "write":
            more["out"][1]._base[-1, -1] = 0.0
        elif "out" in more:
            more["out"][0][-1, -1] += case.query_MD._base[-1, -1]
        return result

    monkeypatch.setattr(type(sanitized.make_case(frozenset(), (4, 8, 8))), "run", beyond)
    with pytest.raises(AssertionError, match=r"written around|change a gradient by nan"):
        sanitized.check(frozenset(), torch.float32, cpu)
