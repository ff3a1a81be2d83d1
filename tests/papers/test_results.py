"""Results are read and written as earlier versions wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowmem_cft.papers.records import Records
from lowmem_cft.papers.results import Source
from places import ROOT

OLD = ROOT / "tests" / "fixtures" / "old" / "paper"


@pytest.mark.parametrize("name", Records(OLD).names())
def test_a_record_is_written_as_it_was_read(tmp_path: Path, name: str) -> None:
    old, new = Records(OLD), Records(tmp_path)
    record = old.get(name)
    assert record is not None
    new.write(record)
    assert new.path(name).read_bytes() == old.path(name).read_bytes()


def test_what_was_asked_for_is_written_as_it_was_read(tmp_path: Path) -> None:
    old, new = Records(OLD), Records(tmp_path)
    new.write_run(old.run())
    assert json.loads(new.run_file.read_text()) == json.loads(old.run_file.read_text())


def test_a_source_is_named_without_the_folders_of_one_machine() -> None:
    for path, name in (("/here/rows.csv", "rows.csv"), ("some/rows.csv", "some/rows.csv")):
        assert Source(path=path, rows=1, sha256=None).name == name
