"""Errors of the library name arguments; the command line says the flags that stand for them."""

from __future__ import annotations

import re

import pytest

from lowmem_cft.cli.app import with_flags
from places import ROOT
from running import Run


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("`out`: a is a file", "--out: a is a file"),
        ("leave out `recipe` and `overrides`", "leave out --recipe and --set"),
        ("`mteb_out` needs `clean_up`, not `sets`", "--mteb-out needs --clean-up, not --set-name"),
        ("run `pip install` or `lowmem`", "run `pip install` or `lowmem`"),
    ],
)
def test_arguments_become_flags(message: str, wanted: str) -> None:
    assert with_flags(message) == wanted


def test_a_command_says_its_flags(command: Run) -> None:
    code, _, err = command("eval", "MODEL", "--protocol", "mine")
    assert code == 2
    assert "--protocol: got 'mine'" in err


def test_the_library_knows_no_flags() -> None:
    """But in whole commands, which anyone may type."""
    for file in (ROOT / "lowmem_cft").rglob("*.py"):
        if "cli" in file.parts:
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            flags = re.findall(r"(?<![\w-])--[a-z][a-z-]+", line)
            known = "lowmem-cft " in line or "pip" in line or "command" in line or "`--set" in line
            assert not flags or known, f"{file}: {line.strip()}"
