"""What the machine has, and what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowmem_cft.cli import doctor
from lowmem_cft.cli.doctor import Finding
from lowmem_cft_kernels import LossPath
from running import Run

PATHS = "|".join(path.value for path in LossPath)


def test_doctor(command: Run) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    for what in ("torch", "4-bit", "cache", "compute dtype"):
        assert what in out
    assert re.search(rf"loss.*by the ({PATHS}) path", out), out


def test_a_long_finding_is_whole_in_80_columns(
    command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a path without a blank, and of a remedy with brackets, nothing is lost."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LOWMEM_CFT_CACHE", str(tmp_path / ("a" * 90)))
    findings = [
        *doctor.examine(),
        Finding("note", "sentence-transformers", "absent", "pip install 'lowmem-cft[check]'"),
        Finding("ok", "torch", "2.13.0.dev20260101+cu130.very.long.version.of.a.nightly.build"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    _, out, _ = command("doctor")
    assert max(map(len, out.splitlines())) <= 80
    cells = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    found = "".join("".join(cell[3].split()) for cell in cells)
    for finding in findings:
        assert "".join(finding.found.split()) in found
        assert "".join(finding.remedy.split()) in found
