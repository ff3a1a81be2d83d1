"""From a set's name to its score: sources, sizes, checksums, and what is said when one is missing."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest

from lowmem_cft.data.rows import ScoredPair
from lowmem_cft.evaluation.sts import sets as sts_data
from lowmem_cft.evaluation.sts.protocols import DEMO_PAIRS, PROTOCOLS, SETS, find_in
from lowmem_cft.evaluation.sts.sets import load_set, load_sets, pairs_sha256
from made_sets import write_tsv

MTEB, SENTEVAL = PROTOCOLS["mteb"], PROTOCOLS["senteval"]


def rows(count: int, seed: int = 0) -> list[tuple[str, str, float]]:
    draw = np.random.default_rng(seed)
    gold = draw.uniform(0, 5, count).round(2)
    return [(f"text {i} a", f"text {i}  b", float(score)) for i, score in enumerate(gold)]


def table(listed: Sequence[tuple[str, str, float]]) -> datasets.Dataset:
    names = ("sentence1", "sentence2", "score")
    columns = zip(*listed, strict=True)
    return datasets.Dataset.from_dict(dict(zip(names, map(list, columns), strict=True)))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub does not answer; what it was asked for is kept."""
    asked: list[str] = []

    def load_dataset(path: str, *args: object, **kwargs: object) -> None:
        asked.append(path)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


# --- sources ----------------------------------------------------------------------------------


def test_a_file_stands_with_its_checksum(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "BIOSSES/BIOSSES.mteb.tsv", rows(100))
    loaded = load_set("BIOSSES", tmp_path)
    assert loaded.version == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    assert (loaded.source, loaded.set_pairs, loaded.own_text) == ("BIOSSES.mteb.tsv", 100, True)
    assert [(p.sentence1, p.sentence2, p.score) for p in loaded.pairs] == rows(100)


def test_another_text_than_the_protocols_is_marked(tmp_path: Path) -> None:
    write_tsv(tmp_path / "BIOSSES/BIOSSES.tsv", rows(100))
    assert not load_set("BIOSSES", tmp_path).own_text


def test_a_saved_data_set(tmp_path: Path, no_hub: list[str]) -> None:
    saved = datasets.DatasetDict({"train": table(rows(3, 1)), "test": table(rows(250))})
    saved.save_to_disk(tmp_path / "STS17")
    loaded = load_set("STS17", tmp_path)
    assert len(loaded.pairs) == 250
    assert loaded.version == f"pairs:{pairs_sha256(loaded.pairs)[:12]}"
    assert no_hub == []
    assert load_set(str(tmp_path / "STS17"), None).pairs == loaded.pairs


def test_the_hub_at_its_revision_then_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, config: str | None, *, split: str, revision: str) -> Any:
        asked.append((path, config, split, revision))
        return table(rows(250))

    monkeypatch.setenv("LOWMEM_CFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for folder in (None, tmp_path):  # without a data folder, and with one that has not the set
        loaded = load_set("STS17", folder)
        assert loaded.source == "mteb/sts17-crosslingual-sts"
        assert loaded.version == "revision:faeb762787bd"
        assert len(loaded.pairs) == 250
    hub = SETS["STS17"].hub
    assert hub is not None
    assert asked == [("mteb/sts17-crosslingual-sts", "en-en", "test", hub.revision)]


def test_offline_reads_what_the_hub_gave_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_hub: list[str]
) -> None:
    monkeypatch.setenv("LOWMEM_CFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="offline, so the hub was not asked"):
        load_set("STS17", None, offline=True)
    with monkeypatch.context() as online:
        online.setattr(datasets, "load_dataset", lambda *args, **kwargs: table(rows(250)))
        fetched = load_set("STS17", None)
    assert load_set("STS17", None, offline=True) == fetched
    assert len(fetched.pairs) == 250
    assert no_hub == []


def test_offline_never_asks(no_hub: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offline, so the hub was not asked"):
        load_set("STS12", tmp_path, offline=True)
    assert no_hub == []


def test_a_missing_set_is_named_with_where_to_get_it(no_hub: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval set STS12: ") as caught:
        load_set("STS12", tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), "STS12/STS12.mteb.tsv", "STS12/STS12.tsv", "no route to host"):
        assert part in message
    assert "get it from https://huggingface.co/datasets/mteb/sts12-sts" in message
    assert no_hub == ["mteb/sts12-sts"]
    with pytest.raises(ValueError, match=r"LOWMEM_CFT_DATA names no folder .*STS12/STS12\.mteb"):
        load_set("STS12", None)
    with pytest.raises(ValueError, match="get it from https://zenodo"):
        load_set("SICK-R", tmp_path, protocol=SENTEVAL)


def test_all_missing_sets_are_named_at_once(
    no_hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(tmp_path))
    write_tsv(tmp_path / "STS17/STS17-en-en.tsv", rows(250))
    write_tsv(tmp_path / "BIOSSES/BIOSSES.mteb.tsv", rows(99))
    with pytest.raises(ValueError, match="8 of 9 sets cannot be read") as caught:
        load_sets(MTEB, None)
    message = str(caught.value)
    missing = {entry.name for entry in MTEB.sets} - {"STS17", "BIOSSES"}
    assert set(re.findall(r"eval set (\S+): ", message)) == missing
    assert "BIOSSES.mteb.tsv: got 99 pairs, BIOSSES has 100 under the mteb protocol" in message
    assert [loaded.name for loaded in load_sets(MTEB, ["STS17"])] == ["STS17"]


# --- names and sizes --------------------------------------------------------------------------


def test_names() -> None:
    assert load_set("demo", None).source == DEMO_PAIRS.name
    assert load_set(str(DEMO_PAIRS), None).pairs == load_set("demo", None).pairs
    with pytest.raises(
        ValueError, match=r"'STS18': no such file .*, and none of STS12, .* or demo"
    ):
        load_set("STS18", None)
    with pytest.raises(ValueError, match=r"the senteval protocol has STS12, .*, SICK-R"):
        load_set("STS17", None, protocol=SENTEVAL)
    with pytest.raises(ValueError, match="demo: named twice"):
        load_sets(None, ["demo", "demo"])


def test_a_folder_that_is_no_saved_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_set(str(tmp_path), None)


@pytest.mark.parametrize("count", [249, 251])
def test_size_is_the_protocols(tmp_path: Path, count: int) -> None:
    write_tsv(tmp_path / "STS17/STS17-en-en.tsv", rows(count))
    with pytest.raises(ValueError, match=f"got {count} pairs, STS17 has 250"):
        load_set("STS17", tmp_path, limit=10)


def test_sentevals_sick_is_the_test_split(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "SICK-R/SICK-full.tsv", rows(4927), subset="test")
    with file.open("a") as stream:
        stream.write("train\ta\tb\t1\ntrial\ta\tb\t2\n")
    loaded = load_set("SICK-R", tmp_path, protocol=SENTEVAL)
    assert len(loaded.pairs) == loaded.set_pairs == 4927
    assert loaded.pairs[3].sentence2 == "text 3 b", "SentEval cuts texts into words"
    assert not loaded.own_text
    with pytest.raises(ValueError, match="SICK-R"):
        load_set("SICK-R", tmp_path, protocol=MTEB, offline=True)


def test_sets_at_hand_have_the_protocols_sizes(data_folder: Path) -> None:
    if any(find_in(entry, data_folder) is None for entry in (*MTEB.sets, *SENTEVAL.sets)):
        pytest.skip("the data folder has not all sets")
    sizes = {
        name: {s.name: (len(s.pairs), s.own_text) for s in load_sets(protocol, None, offline=True)}
        for name, protocol in PROTOCOLS.items()
    }
    assert {name: size for name, (size, _) in sizes["mteb"].items()} == {
        entry.name: entry.num_pairs for entry in MTEB.sets
    }
    assert list(sizes["senteval"]) == [entry.name for entry in SENTEVAL.sets]
    assert sizes["senteval"]["SICK-R"][0] == 4927


def test_a_limit_draws_from_the_whole_set(tmp_path: Path) -> None:
    """Sets are ordered by where their pairs come from: the first ones are of one kind."""
    file = write_tsv(tmp_path / "STS17/STS17-en-en.tsv", rows(250))
    whole, some = load_set("STS17", tmp_path), load_set("STS17", tmp_path, 50)
    place = [whole.pairs.index(pair) for pair in some.pairs]
    assert len(set(place)) == 50
    assert place == sorted(place)
    assert place[0] < 50
    assert place[24] < 200
    assert place[-1] >= 200
    assert some == load_set("STS17", tmp_path, 50)
    assert (some.set_pairs, some.version) == (250, whole.version)
    cleaned = load_set(str(file), None, 50, cleaned_up=True)
    assert [whole.pairs.index(p) for p in load_set(str(file), None, 50).pairs] == place
    assert cleaned.pairs[0].sentence1 == f"{some.pairs[0].sentence1}."
    assert load_set("STS17", tmp_path, 250) == whole


# --- clean-up ---------------------------------------------------------------------------------


def test_clean_up_reaches_every_text(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "pairs.tsv", [("a b", "c?", 1.0), ('d "e" f', "g.", 2.0)])
    loaded = load_set(str(file), None, cleaned_up=True)
    assert loaded.pairs == [ScoredPair("a b.", "c.", 1.0), ScoredPair("d 'e' f.", "g.", 2.0)]
    plain = load_set(str(file), None)
    assert plain.version == loaded.version
    assert pairs_sha256(plain.pairs) != pairs_sha256(loaded.pairs)


# --- checksums --------------------------------------------------------------------------------


def test_checksum_of_pairs_tells_any_change() -> None:
    pairs = [ScoredPair("ab", "c", 1.0), ScoredPair("d", "e", 2.0)]
    changed = [
        [ScoredPair("a", "bc", 1.0), pairs[1]],
        [ScoredPair("ab", "c", 1.5), pairs[1]],
        pairs[::-1],
        pairs[:1],
    ]
    sums = {pairs_sha256(some) for some in (pairs, *changed)}
    assert len(sums) == 5
    assert pairs_sha256(list(pairs)) in sums


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find: Callable[[], Path | None] = sts_data.data_folder
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(tmp_path))
    assert find() == tmp_path
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="no such folder"):
        find()
    monkeypatch.delenv("LOWMEM_CFT_DATA")
    assert find() is None


# --- columns ----------------------------------------------------------------------------------


def test_columns_behind_a_files_name(tmp_path: Path) -> None:
    file = write_tsv(tmp_path / "a.tsv", rows(5))
    turned = "".join(f"{score}\t{a}\t{b}\n" for a, b, score in rows(5))
    headless = tmp_path / "b.tsv"
    headless.write_text(turned, encoding="utf-8")
    wanted = load_set(str(file), None).pairs
    name = f"{headless}::2, 3,1"
    loaded = load_set(name, None)
    assert loaded.pairs == wanted
    assert (loaded.name, loaded.source) == (name, "b.tsv")
    assert load_set(f"{file}::sentence1,sentence2,score", None).pairs == wanted
    saved = tmp_path / "saved"
    table(rows(5)).rename_column("score", "rating").save_to_disk(saved)
    assert load_set(f"{saved}::sentence1,sentence2,rating", None).pairs == wanted
    for wrong, message in (
        (str(headless), rf"eval set .*first line is data.*: {re.escape(str(headless))}::2,3,1$"),
        (str(saved), rf"cannot tell.*: {re.escape(str(saved))}::sentence1,sentence2,rating$"),
        (f"{headless}::1,2", r"got 2 columns .* wanted those of sentence1, sentence2 and score"),
        (f"{headless}::1,2,4", "no column '4'"),
        (f"{tmp_path / 'c.tsv'}::1,2,3", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_set(wrong, None)


def test_scores_that_do_not_differ(tmp_path: Path) -> None:
    constant = write_tsv(tmp_path / "a.tsv", [(a, b, 2.5) for a, b, _ in rows(4)])
    with pytest.raises(ValueError, match=r"a.tsv: got 4 pairs, all with the score 2\.5, which"):
        load_set(str(constant), None)
    one_differs = write_tsv(tmp_path / "b.tsv", [("a", "b", 1.0)] * 40 + [("a", "b", 2.0)])
    with pytest.raises(ValueError, match="got 2 pairs drawn of 41, all with the score 1"):
        load_set(str(one_differs), None, limit=2)


def test_the_same_pairs_in_every_format(tmp_path: Path) -> None:
    """With quotes, commas and a line end in them: as csv.writer, pandas and JSON write them."""
    pairs = [
        ('he said "no", twice', "he refused", 4.0),
        ('a 6" pipe', "it's, well, a pipe", 1.5),
        ("two\nlines", 'a "quoted" end"', 0.0),
        ("plain", "  spaces around  ", 5.0),
    ]
    frame = pandas.DataFrame(pairs, columns=["sentence1", "sentence2", "score"])
    for suffix, mark in ((".csv", ","), (".tsv", "\t"), (".csv.gz", ";")):
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
            file = tmp_path / f"{quoting}{suffix}"
            frame.to_csv(file, sep=mark, quoting=quoting, index=False)
            bare = tmp_path / f"bare{quoting}{suffix}"
            frame.to_csv(bare, sep=mark, quoting=quoting, index=False, header=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json", orient="records")
    frame.to_parquet(tmp_path / "a.parquet")
    table(pairs).save_to_disk(tmp_path / "saved")
    wanted = [ScoredPair(a.strip(), b.strip(), score) for a, b, score in pairs]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 22
    for name in names:
        named = f"{tmp_path / name}::1,2,3" if name.startswith("bare") else str(tmp_path / name)
        assert load_set(named, None).pairs == wanted, name
