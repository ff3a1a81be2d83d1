"""`eval` and `compare` as a user meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lowmem_cft.evaluation import suites
from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts import sets
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS
from lowmem_cft.inference.embed import Embed
from made_sets import write_tsv
from running import MEAN, Run, sentences


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
def test_a_protocol_with_sets_missing_names_them(command: Run, tiny_folder: Path) -> None:
    code, out, err = command("eval", str(tiny_folder), "--suite", "sts", *MEAN)
    assert code == 2
    assert out == ""
    assert "7 of 9 sets cannot be read" in err
    for entry in PROTOCOLS["mteb"].sets:
        assert (f"eval set {entry.name}: " in err) == (entry.name not in ("STS17", "BIOSSES"))
    assert err.count("get it from https://huggingface.co/datasets/mteb/") == 7


@pytest.mark.usefixtures("sets_at_hand")
def test_eval_compare_and_mteb(command: Run, tiny_folder: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    sets = ("--protocol", "mteb", "-s", "STS17", "-s", "BIOSSES", "--resamples", "20")
    code, out, err = command("eval", str(tiny_folder), *sets, *MEAN, "--out", str(a))
    assert code == 0, err
    assert re.search(r"STS17 +│ +250 │ +-?\d+\.\d\d │ *-?\d+\.\d\d to -?\d+\.\d\d │ ", out), out
    assert "BIOSSES*" in out
    assert "│ mean of 2 of 9 " in out
    result = json.loads(a.read_text())
    assert result["complete"] is False
    assert result["protocol"].endswith("(mteb)")
    for entry in result["sets"]:
        assert entry["version"].removeprefix("sha256:") in out
        assert entry["interval"]["low"] <= entry["interval"]["high"]
    code, _, err = command(
        "eval", str(tiny_folder), *sets, *MEAN, "--set", "embedding.pooling=last", "--out", str(b)
    )
    assert code == 0, err
    code, out, err = command("compare", str(a), str(b), "--out", str(tmp_path / "c.json"))
    assert code == 0, err
    comparison = json.loads((tmp_path / "c.json").read_text())
    assert comparison["mean"]["difference"] != 0
    for entry in (*comparison["sets"], comparison["mean"]):
        assert f"{100 * entry['difference']:+.2f}" in out
    assert comparison["bootstrap"]["resamples"] == 1000
    code, _, err = command(
        "eval", str(tiny_folder), "-s", "STS17", *MEAN, "--clean-up", "--out", str(b)
    )
    assert code == 0, err
    code, _, err = command("compare", str(a), str(b))
    assert code == 2
    assert "different protocols" in err


@pytest.mark.usefixtures("sets_at_hand")
def test_mteb_results_are_of_its_texts_alone(
    command: Run,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    place = tmp_path / "m"
    into = ("--protocol", "mteb", "--resamples", "2", "--mteb-out", str(place))
    empty = tmp_path / "empty"  # no model, which would be found out after the texts
    empty.mkdir()
    code, _, err = command("eval", str(empty), "-s", "STS17", "-s", "BIOSSES", *into)
    assert code == 2
    shown = re.sub(r"[│\s]+", " ", err)
    assert "--mteb-out: BIOSSES: the text at hand is not that of mteb's task" in shown
    assert "STS17" not in shown
    assert not place.exists()
    code, _, err = command("eval", str(tiny_folder), "-s", "STS17", *into, *MEAN)
    assert code == 0, err
    assert [file.name for file in place.iterdir()] == ["STS17.json"]
    (tmp_path / "file").touch()
    into = (*into[:-1], str(tmp_path / "file"))
    code, out, err = command("eval", str(tiny_folder), "-s", "STS17", *into, *MEAN)
    assert (code, out) == (2, "")
    assert "--mteb-out: " in err
    assert "file is a file, wanted a folder" in re.sub(r"\s+", " ", err)
    assert "loading" not in err


@pytest.mark.usefixtures("sets_at_hand")
@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, RuntimeError])
def test_sets_scored_before_a_stop_are_kept(
    command: Run,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_by: type[BaseException],
) -> None:
    names = ("STS17", "BIOSSES", "demo")
    named = [part for name in names for part in ("-s", name)]
    out = tmp_path / "scores.json"
    arguments = ("eval", str(tiny_folder), *named, *MEAN, "--resamples", "9", "--out", str(out))
    real = suites.score_pairs

    def stops(embed: Embed, loaded: sets.LoadedSet) -> suites.ScoredSet:
        if loaded.name == "demo":
            raise stopped_by("stopped")
        return real(embed, loaded)

    with monkeypatch.context() as broken:
        broken.setattr(suites, "score_pairs", stops)
        code, _, err = command(*arguments)
    assert code != 0
    assert "what was scored before it stopped is in" in err
    assert f"{tmp_path}/unfinished-scores.json" in "".join(err.split())
    unfinished = eval_report.read(tmp_path / "unfinished-scores.json")
    assert unfinished.names == ["STS17", "BIOSSES"]
    assert not out.exists()
    code, _, err = command(*arguments)
    assert code == 0, err
    assert eval_report.read(out).names == list(names)
    for mine, again in zip(unfinished.cosines, eval_report.read(out).cosines, strict=False):
        assert np.array_equal(mine, again)
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert left == ["scores.json", "scores.npz"]


@pytest.mark.usefixtures("sets_at_hand")
def test_reports_in_a_run_lie_side_by_side(command: Run, finished: Path) -> None:
    for names in (["STS17"], ["BIOSSES"], ["STS17", "BIOSSES"]):
        named = [part for name in names for part in ("-s", name)]
        code, _, err = command("eval", str(finished), *named, "--resamples", "9", "--offline")
        assert code == 0, err
    assert {path.name: eval_report.read(path).names for path in finished.glob("*eval*.json")} == {
        "eval-sts-STS17.json": ["STS17"],
        "eval-sts-BIOSSES.json": ["BIOSSES"],
        "eval-sts-BIOSSES-STS17.json": ["STS17", "BIOSSES"],
    }


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
    command: Run,
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


def test_a_file_where_a_folder_stands(
    command: Run,
    tmp_path: Path,
) -> None:
    (tmp_path / "scores.json").mkdir()
    out = str(tmp_path / "scores.json")
    code, _, err = command("eval", "any", "-s", "demo", "--offline", "--out", out)
    assert code == 2
    assert "scores.json is a folder, wanted a file" in re.sub(r"\s+", " ", err)


def test_nothing_to_compare(command: Run, tmp_path: Path) -> None:
    code, _, err = command("compare", str(tmp_path), str(tmp_path / "gone"))
    assert code == 2
    assert f"lowmem-cft eval {tmp_path}" in err


def test_embed_and_eval_take_a_sentence_transformer_as_it_is(
    command: Run, peer_folder: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["the cat sat", "a dog ran in the house", "the cat sat"]
    file, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    file.write_text("\n".join(texts))
    reference = SentenceTransformer(str(peer_folder), device="cpu")
    for options, encode in (
        ((), reference.encode),
        (("--as", "query"), reference.encode_query),
        (("--as", "document"), reference.encode_document),
    ):
        code, _, err = command("embed", str(peer_folder), str(file), "--out", str(out), *options)
        assert code == 0, err
        assert np.load(out) == pytest.approx(encode(texts), abs=1e-6)
    code, _, err = command("embed", str(peer_folder), str(file), "--as", "passage")
    assert code == 2
    assert "--as: got 'passage', wanted query or document" in err
    code, _, err = command("icl-search", str(peer_folder), "-s", "demo", "--limit", "5")
    assert code == 2
    assert "is a sentence-transformers model" in err
