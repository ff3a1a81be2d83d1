"""Records that are damaged are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fabricated import (
    Fabricated,
)
from lowmem_cft.papers.report.write import write_report


def test_damaged_records(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"reproduction\.json: cannot be read"):
        write_report(folder)
    made = Fabricated(folder, "cft", "phi-2")
    made.data()
    path = folder / "stages" / "data.json"
    good = path.read_text()
    for wrong, message in (
        (good[:100], r"data\.json: no record of a reproduction \(file: Invalid JSON"),
        (
            good.replace('"rows": 27560, "published', '"published'),
            r"\(result\.rows: Field required",
        ),
        (good.replace('"kind": "data"', '"kind": "other"'), r"\(kind: Input should be"),
        (good.replace('"name": "data"', '"name": "base"'), r"got a record of 'base'"),
    ):
        assert wrong != good
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            write_report(folder)
    path.rename(path.with_name("base.json")).write_text(
        good.replace('"name": "data"', '"name": "base"')
    )
    with pytest.raises(ValueError, match=r"base\.json: got kind 'data', wanted a result of eval"):
        write_report(folder)
