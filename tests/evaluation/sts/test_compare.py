"""The comparison of two evaluated models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from lowmem_cft.evaluation.sts import compare
from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts.correlation import spearman
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, SCORED
from made_reports import drawn_pairs, scored, scores_of, write_report

MTEB = PROTOCOLS["mteb"]


def test_difference_and_interval_by_hand(tmp_path: Path) -> None:
    a, b = (write_report(tmp_path / f"{n}.json", n) for n in (0.5, 0.4))
    comparison = compare.compare(a, b, 200)
    diffs = []
    for i, entry in enumerate(comparison.sets):
        gold = scores_of(300 + 100 * i, i, 0.5, ties=False)[0]
        first, second = (scores_of(len(gold), i, n, ties=False)[1] for n in (0.5, 0.4))
        diff_B = [
            float(spearmanr(second[r], gold[r]).statistic - spearmanr(first[r], gold[r]).statistic)
            for r in drawn_pairs(entry.name, len(gold), 200)
        ]
        diffs.append(diff_B)
        assert entry.difference == pytest.approx(spearman(second, gold) - spearman(first, gold))
        low, high = np.percentile(diff_B, [2.5, 97.5])
        assert (entry.interval.low, entry.interval.high) == pytest.approx((low, high))
        assert entry.difference > 0
    low, high = np.percentile(np.mean(diffs, axis=0), [2.5, 97.5])
    assert (comparison.mean.interval.low, comparison.mean.interval.high) == pytest.approx(
        (low, high)
    )
    assert comparison.mean.difference == pytest.approx(comparison.mean.b - comparison.mean.a)
    assert comparison.mean.interval.low > 0
    back = compare.compare(b, a, 200)
    assert back.mean.difference == pytest.approx(-comparison.mean.difference)
    assert back.mean.interval.low == pytest.approx(-comparison.mean.interval.high)


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = write_report(tmp_path / "eval.json", 0.4)
    comparison = compare.compare(path, path, 50)
    for entry in (*comparison.sets, comparison.mean):
        assert (entry.difference, entry.interval.low, entry.interval.high) == (0, 0, 0)


def test_order_of_sets_does_not_count(tmp_path: Path) -> None:
    path = write_report(tmp_path / "a.json", 0.4)
    values = json.loads(path.read_text())
    values["sets"].reverse()
    (tmp_path / "b.json").write_text(json.dumps(values))
    arrays = dict(np.load(tmp_path / "a.npz"))
    turned = {
        f"{kind}_{2 - i}": arrays[f"{kind}_{i}"] for kind in ("cosine", "gold") for i in range(3)
    }
    np.savez(tmp_path / "b.npz", **turned)
    assert compare.compare(path, tmp_path / "b.json", 50).mean.difference == 0


REFUSED = {
    "protocol": ({"protocol": PROTOCOLS["senteval"]}, "different protocols"),
    "clean-up": ({"cleaned_up": True}, "different protocols"),
    "sets": ({"names": ("STS12", "STS13")}, "different sets: STS14"),
    "pairs": ({"sha256": "e" * 64}, "STS12: different pairs: sha256 ffffffffffff"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, what: str) -> None:
    options, message = REFUSED[what]
    a = write_report(tmp_path / "a.json", 0.4)
    b = write_report(tmp_path / "b.json", 0.4, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        compare.compare(a, b)


def test_no_protocol_is_not_mtebs(tmp_path: Path) -> None:
    a, b = (write_report(tmp_path / f"{n}.json", n, protocol=None) for n in (0.4, 0.3))
    assert compare.compare(a, b, 9).a.label == SCORED != MTEB.scored
    with pytest.raises(ValueError, match="different protocols"):
        compare.compare(write_report(tmp_path / "c.json", 0.4), b, 9)


def test_damaged_reports(tmp_path: Path) -> None:
    path = write_report(tmp_path / "a.json", 0.4)
    other = write_report(tmp_path / "b.json", 0.4)
    (tmp_path / "b.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"b\.npz: the similarities .* score the model again"):
        compare.compare(path, other)
    (tmp_path / "b.npz").unlink()
    with pytest.raises(ValueError, match=r"b\.npz: the similarities"):
        compare.compare(path, other)
    write_report(tmp_path / "c.json", 0.4, ("STS13", "STS12", "STS14", "STS15"))
    (tmp_path / "c.npz").replace(tmp_path / "b.npz")
    values = json.loads(other.read_text())
    values["sets"] = values["sets"][1:]
    other.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"holds \[300, 400\] pairs, b\.json says \[400, 500\]"):
        compare.compare(path, other)
    for text in ("{}", "no json", "[1]", '{"sets": [{}]}'):
        other.write_text(text)
        with pytest.raises(ValueError, match=r"b\.json: no report of `lowmem-cft eval`"):
            compare.compare(path, other)


def test_reports_of_run_folders(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
    with pytest.raises(ValueError, match="no such run folder or report"):
        compare.find_reports(tmp_path / "gone", b)
    with pytest.raises(ValueError, match="holds no report"):
        compare.find_reports(a, b)
    (a / "eval.json").touch()
    (b / "eval-mteb.json").touch()
    assert compare.find_reports(a, b) == (a / "eval.json", b / "eval-mteb.json")
    (a / "eval-mteb.json").touch()
    assert compare.find_reports(a, b) == (a / "eval-mteb.json", b / "eval-mteb.json")
    assert compare.find_reports(b / "eval-mteb.json", a)[1] == a / "eval-mteb.json"
    (b / "eval.json").touch()
    with pytest.raises(ValueError, match=r"several reports could be meant .* name the two files"):
        compare.find_reports(a, b)
    (b / "eval.json").unlink()
    (b / "eval-mteb.json").rename(b / "eval-senteval.json")
    with pytest.raises(ValueError, match="no report of the same name"):
        compare.find_reports(a, b)
    transfer = tmp_path / "eval-transfer.json"
    transfer.write_text('{"suite": "transfer"}')
    for places in ((a, transfer), (transfer, a)):
        with pytest.raises(ValueError, match=r"eval-transfer\.json: a report of transfer tasks"):
            compare.find_reports(*places)
    valid = write_report(tmp_path / "mine.json", 0.4)
    with pytest.raises(ValueError, match=r"no report of the same name .* name the two files"):
        compare.find_reports(a, valid)


def test_reports_of_other_sets_are_found_by_name(tmp_path: Path) -> None:
    paths = []
    for run, noise in (("a", 0.4), ("b", 0.3)):
        for names in (["STS12"], ["transfer.tsv"]):
            path = write_report(tmp_path / run / "new.json", noise, names, protocol=None)
            kind = eval_report.report(
                "m", [scored(names[0], *scores_of(300, 0, noise, ties=False))], num_resamples=2
            ).file_name
            paths.append(path.rename(path.with_name(kind)))
            path.with_suffix(".npz").rename(paths[-1].with_suffix(".npz"))
        if run == "b":
            paths.pop(2).unlink()
    assert compare.find_reports(tmp_path / "a", tmp_path / "b") == (paths[1], paths[2])
    assert compare.compare(tmp_path / "a", tmp_path / "b", 10).a.names == ["transfer.tsv"]
