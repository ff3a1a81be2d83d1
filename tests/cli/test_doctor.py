"""What the machine has, and what is missing."""

from __future__ import annotations

import re

from lowmem_cft_kernels import LossPath
from running import Run

PATHS = "|".join(path.value for path in LossPath)


def test_doctor(command: Run) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    for what in ("torch", "4-bit", "cache", "compute dtype"):
        assert what in out
    assert re.search(rf"loss.*by the ({PATHS}) path", out), out
