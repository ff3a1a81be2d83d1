"""Reports of STS sets: their files, their names, and what is said of damaged ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, Protocol
from lowmem_cft.evaluation.sts.score import ScoredSet
from made_reports import scored, scores_of, write_report

MTEB = PROTOCOLS["mteb"]


def test_report_reads_back(tmp_path: Path) -> None:
    path = write_report(tmp_path / "eval.json", 0.3)
    values = json.loads(path.read_text())
    assert values["protocol_name"] == "mteb"
    assert values["complete"] is False
    assert values["mean"] == pytest.approx(np.mean([entry["spearman"] for entry in values["sets"]]))
    for entry in (*values["sets"], {"interval": values["mean_interval"]}):
        assert entry["interval"]["low"] < entry["interval"]["high"]
    widths = [entry["interval"]["high"] - entry["interval"]["low"] for entry in values["sets"]]
    mean = values["mean_interval"]
    assert mean["high"] - mean["low"] < min(widths), "a mean varies less than its sets"
    assert values["mean"] == pytest.approx((mean["low"] + mean["high"]) / 2, abs=0.05)
    stored = eval_report.read(path)
    assert stored.names == ["STS12", "STS13", "STS14"]
    for i, cosine in enumerate(stored.cosines):
        assert np.array_equal(cosine, scores_of(300 + 100 * i, i, 0.3, ties=False)[1])


def test_names_of_reports_in_a_run() -> None:
    """A report never replaces one of other sets, or of the same sets scored otherwise."""
    gold, cosine = scores_of(50, 0, 0.3, ties=False)
    of = lambda *names: [scored(name, gold, cosine) for name in names]
    every = of(*(entry.name for entry in MTEB.sets))

    def name(sets: list[ScoredSet], protocol: Protocol | None, **options: bool) -> str:
        report = eval_report.report("m", sets, protocol=protocol, num_resamples=2, **options)
        return report.file_name

    assert name(every, MTEB) == "eval-mteb.json"
    assert name(of("STS13", "STS12"), MTEB) == "eval-mteb-partial-STS12-STS13.json"
    assert name(every, MTEB, cleaned_up=True) == "eval-mteb-clean-up.json"
    assert name(every, MTEB, float32=True) == "eval-mteb-float32.json"
    assert name(of("STS12"), None) == "eval-sts-STS12.json"
    assert name(of("demo"), None, cleaned_up=True) == "eval-sts-demo-clean-up.json"
    names = [name(every[:k], None) for k in range(1, 10)]
    assert len(set(names)) == 9
    assert max(map(len, names)) < 90
    file = lambda path, sha256: name([scored(path, gold, cosine, sha256)], None)
    assert file("a/pairs.tsv", "e" * 64) == "eval-sts-pairs-eeeeeeeeeeee.json"
    assert file("b/pairs.tsv", "f" * 64) == "eval-sts-pairs-ffffffffffff.json"
    odd = [file(path, "f" * 64) for path in ("a b.tsv", "a:b.tsv", "x" * 300 + ".tsv")]
    assert len(set(odd)) == 3
    for file_name in odd:
        assert re.fullmatch(r"eval-sts-[A-Za-z0-9._-]{1,80}\.json", file_name)


def test_the_pairs_of_another_model_are_noticed(tmp_path: Path) -> None:
    a, b = (write_report(tmp_path / f"{n}.json", n) for n in (0.4, 0.3))
    (tmp_path / "0.4.npz").replace(tmp_path / "0.3.npz")
    with pytest.raises(ValueError, match=r"0\.3\.npz: its pairs of STS12 do not have the score in"):
        eval_report.read(b)
    assert eval_report.read(write_report(a, 0.4)).names == ["STS12", "STS13", "STS14"]
    arrays = dict(np.load(tmp_path / "0.4.npz"))
    np.savez(tmp_path / "0.4.npz", **{**arrays, "cosine_1": np.full(400, np.nan)})
    with pytest.raises(ValueError, match=r"0\.4\.npz: STS13: got 400 of 400 cosines"):
        eval_report.read(a)
    np.savez(tmp_path / "0.4.npz", **{**arrays, "gold_1": arrays["gold_1"][:-1]})
    with pytest.raises(ValueError, match=r"holds \[300, 399, 500\] pairs"):
        eval_report.read(a)
