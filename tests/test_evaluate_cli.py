"""`eval` and `compare` as a user meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lowmem_cft.sts import PROTOCOLS
from test_cli import Run, command  # noqa: F401 (fixture)
from test_evaluate import write_tsv
from test_train import sentences

MEAN = ("--set", "embedding.pooling=mean", "--set", "model.dtype=fp32", "--offline")


@pytest.fixture
def sets_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with STS17, and BIOSSES in another text than the protocol's."""
    folder = tmp_path / "data"
    for file, count, seed in (("STS17/STS17-en-en.tsv", 250, 1), ("BIOSSES/BIOSSES.tsv", 100, 4)):
        gold = np.random.default_rng(seed).uniform(0, 5, count).round(2)
        texts = sentences(seed + 1, count), sentences(seed + 2, count)
        write_tsv(folder / file, list(zip(*texts, gold, strict=True)))
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(folder))
    return folder


@pytest.mark.usefixtures("sets_at_hand")
def test_a_protocol_with_sets_missing_names_them(command: Run, tiny_folder: Path) -> None:  # noqa: F811
    code, out, err = command("eval", str(tiny_folder), "--suite", "sts", *MEAN)
    assert code == 2
    assert out == ""
    assert "7 of 9 sets cannot be read" in err
    for entry in PROTOCOLS["mteb"].sets:
        assert (f"eval set {entry.name}: " in err) == (entry.name not in ("STS17", "BIOSSES"))
    assert err.count("get it from https://huggingface.co/datasets/mteb/") == 7


@pytest.mark.usefixtures("sets_at_hand")
def test_eval_compare_and_mteb(command: Run, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    sets = ("--protocol", "mteb", "-s", "STS17", "-s", "BIOSSES", "--resamples", "20")
    code, out, err = command(
        "eval", str(tiny_folder), *sets, *MEAN, "--out", str(a), "--mteb-out", str(tmp_path / "m")
    )
    assert code == 0, err
    assert re.search(r"STS17 +│ +250 │ +-?\d+\.\d\d │ +-?\d+\.\d\d--?\d+\.\d\d │ ", out), out
    assert "BIOSSES*" in out
    assert "│ mean of 2 of 9 " in out
    result = json.loads(a.read_text())
    assert result["complete"] is False
    for one in result["sets"]:
        assert one["version"].removeprefix("sha256:") in out
        assert one["interval"]["low"] <= one["interval"]["high"]
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == [
        "BIOSSES.json",
        "STS17.json",
    ]
    code, _, err = command(
        "eval", str(tiny_folder), *sets, *MEAN, "--set", "embedding.pooling=last", "--out", str(b)
    )
    assert code == 0, err
    code, out, err = command("compare", str(a), str(b), "--out", str(tmp_path / "c.json"))
    assert code == 0, err
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["mean"]["difference"] != 0
    for entry in (*found["sets"], found["mean"]):
        assert f"{100 * entry['difference']:+.2f}" in out
    assert found["bootstrap"]["resamples"] == 1000
    code, _, err = command(
        "eval", str(tiny_folder), "-s", "STS17", *MEAN, "--clean-up", "--out", str(b)
    )
    assert code == 0, err
    code, _, err = command("compare", str(a), str(b))
    assert code == 2
    assert "different protocols" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--suite", "glue"], "wanted sts"),
        (["--protocol", "glue"], "wanted one of mteb, senteval"),
        (["--protocol", "senteval", "-s", "STS17"], "the senteval protocol has STS12"),
        (["-s", "demo", "--mteb-out", "m"], "needs --protocol mteb"),
        (["-s", "demo", "-s", "demo"], "named twice"),
        (["-s", "demo", "--out", "scores.csv"], "ends in .json"),
        (["-s", "demo", "--resamples", "0"], "resamples"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    command: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("eval", "any", "--offline", *arguments)
    assert code == 2
    assert named in re.sub(r"[│\s]+", " ", err)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_compare(command: Run, tmp_path: Path) -> None:  # noqa: F811
    code, _, err = command("compare", str(tmp_path), str(tmp_path / "gone"))
    assert code == 2
    assert f"lowmem-cft eval {tmp_path}" in err
