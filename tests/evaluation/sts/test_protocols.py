"""Which sets the protocols have, and where they are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.evaluation.sts.protocols import (
    PROTOCOLS,
    SETS,
    Place,
    StsSet,
    find_in,
    protocol_named,
    sets_in,
)


def touch(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="utf-8")
    return path


ENTRIES = [
    pytest.param(entry, id=f"{name}-{entry.name}")
    for name, sets in (
        ("mteb", [*PROTOCOLS["mteb"].sets, SETS["STSBenchmark-dev"]]),
        ("senteval", PROTOCOLS["senteval"].sets),
    )
    for entry in sets
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_set_is_found_in_each_of_its_files(entry: StsSet, tmp_path: Path) -> None:
    assert find_in(entry, tmp_path) is None
    # the first found counts, so the last comes first: originals, a saved data set, own text
    for file in reversed(entry.originals):
        path = touch(tmp_path, file)
        assert find_in(entry, tmp_path) == Place(path, False, entry.where)
    if entry.saved is not None:
        assert entry.hub is not None
        touch(tmp_path, f"{entry.saved}/dataset_dict.json")
        wanted = Place(tmp_path / entry.saved, True, split=entry.hub.split)
        assert find_in(entry, tmp_path) == wanted
    for file in reversed(entry.files):
        path = touch(tmp_path, file)
        assert find_in(entry, tmp_path) == Place(path, True)


def test_the_protocols_sets_and_sizes() -> None:
    sizes = {
        name: {entry.name: entry.num_pairs for entry in protocol.sets}
        for name, protocol in PROTOCOLS.items()
    }
    shared = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186}
    assert sizes["mteb"] == {
        **shared,
        "STS17": 250,
        "STSBenchmark-test": 1379,
        "SICK-R": 9927,
        "BIOSSES": 100,
    }
    assert sizes["senteval"] == {**shared, "STSBenchmark-test": 1379, "SICK-R": 4927}
    assert set(SETS) == {*sizes["mteb"], "STSBenchmark-dev"}


def test_sets_in_a_folder(tmp_path: Path) -> None:
    assert sets_in(tmp_path) == []
    touch(tmp_path, "STS13/STS13.tsv")
    touch(tmp_path, "BIOSSES/BIOSSES.mteb.tsv")
    assert sets_in(tmp_path) == ["STS13", "BIOSSES"]


def test_unknown_protocol() -> None:
    assert protocol_named("senteval") is PROTOCOLS["senteval"]
    with pytest.raises(ValueError, match="got 'glue', wanted one of mteb, senteval"):
        protocol_named("glue")


def test_revisions_are_those_that_mteb_pins() -> None:
    mteb = pytest.importorskip("mteb", reason="mteb is not installed (it needs Python 3.11)")
    from lowmem_cft.evaluation.sts.mteb_results import task_name

    for entry in PROTOCOLS["mteb"].sets:
        wanted = mteb.get_task(task_name(entry.name)).metadata.dataset
        assert entry.hub is not None
        assert {"path": entry.hub.path, "revision": entry.hub.revision} == {
            key: wanted[key] for key in ("path", "revision")
        }, entry.name
