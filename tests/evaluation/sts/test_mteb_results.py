"""Results that mteb reads back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lowmem_cft.evaluation.sts import mteb_results as task_result
from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS
from lowmem_cft.evaluation.sts.score import ScoredSet, SetScore

MTEB = PROTOCOLS["mteb"]


def small_report(names: list[str]) -> eval_report.StsReport:
    draw = np.random.default_rng(0)
    sets = []
    for name in names:
        gold = draw.uniform(0, 5, 50)
        cosine = gold / 5 + 0.2 * draw.normal(size=50)
        rho = float(draw.uniform(0.5, 0.9))
        version = "revision:a0d554a64d88" if name == "STS12" else "sha256:ca803d1deb71"
        score = SetScore(name, rho, 50, 50, f"{name}.tsv", rho - 0.1, version)
        sets.append(ScoredSet(score, cosine, gold, "0" * 64))
    return eval_report.report("m", sets, protocol=MTEB, num_resamples=2)


def test_mteb_reads_the_results_back(tmp_path: Path) -> None:
    pytest.importorskip("mteb", reason="mteb is not installed (it needs Python 3.11)")
    from mteb.results import TaskResult

    report = small_report([entry.name for entry in MTEB.sets])
    paths = task_result.write_task_results(report, tmp_path / "results")
    assert len(paths) == 9
    for path, score in zip(paths, report.scores, strict=True):
        read = TaskResult.from_disk(path)
        assert read.task.metadata.name == path.stem == score.name.removesuffix("-test")
        assert read.get_score() == pytest.approx(score.spearman, abs=1e-12)
        (entry,) = read.scores["test"]
        assert entry["main_score"] == entry[read.task.metadata.main_score]
        assert entry["cosine_pearson"] == pytest.approx(score.pearson, abs=1e-12)
        assert entry["hf_subset"] in read.task.hf_subsets
        assert read.task.eval_splits == ["test"]
        assert read.languages == ["eng"]
        assert read.dataset_revision == score.version.removeprefix("revision:")
        again = tmp_path / "again.json"
        read.to_disk(again)
        assert TaskResult.from_disk(again).get_score() == pytest.approx(score.spearman, abs=1e-6)


@pytest.mark.parametrize("what", ["another protocol", "no protocol", "clean-up"])
def test_only_mteb_scores_become_mteb_results(tmp_path: Path, what: str) -> None:
    protocol = {"another protocol": PROTOCOLS["senteval"], "no protocol": None}.get(what, MTEB)
    sets = small_report(["STS12"]).sets
    cleaned_up = what == "clean-up"
    report = eval_report.report(
        "m", sets, protocol=protocol, cleaned_up=cleaned_up, num_resamples=2
    )
    with pytest.raises(ValueError, match="`mteb_out`"):
        task_result.write_task_results(report, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_only_mtebs_texts_become_mteb_results(tmp_path: Path) -> None:
    sts12, biosses = small_report(["STS12", "BIOSSES"]).sets
    biosses = replace(biosses, score=replace(biosses.score, own_text=False))
    report = eval_report.report("m", [sts12, biosses], protocol=MTEB, num_resamples=2)
    with pytest.raises(ValueError, match="`mteb_out`: BIOSSES: the text at hand"):
        task_result.write_task_results(report, tmp_path / "results")
    assert not (tmp_path / "results").exists()
