"""STS scores as mteb's TaskResult: one JSON file a task, which mteb reads back.

Layout: mteb 2's `TaskResult` (mteb/results/task_result.py): scores by split, each with its subset,
languages and main score. mteb itself is not needed to write it, so `mteb_version` is null: the
numbers were computed here. `dataset_revision` is the hub's revision where the data came from there,
else the checksum of the file that was scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_cft.evaluation.sts.protocols import Protocol
from lowmem_cft.evaluation.sts.report import StsReport
from lowmem_cft.evaluation.sts.score import SetScore
from lowmem_cft.evaluation.sts.sets import LoadedSet
from lowmem_cft.files import write_json

_TASKS = {"STSBenchmark-test": "STSBenchmark"}
"""The names of mteb's tasks that differ from ours."""

_SUBSETS = {"STS17": "en-en"}


def task_name(set_name: str) -> str:
    return _TASKS.get(set_name, set_name)


def as_task_result(score: SetScore) -> dict[str, Any]:
    """What mteb's TaskResult holds for a set of the mteb protocol."""
    entry = {
        "main_score": score.spearman,
        "cosine_spearman": score.spearman,
        "cosine_pearson": score.pearson,
        "hf_subset": _SUBSETS.get(score.name, "default"),
        "languages": ["eng-Latn"],
    }
    return {
        "dataset_revision": score.version.removeprefix("revision:"),
        "task_name": task_name(score.name),
        "mteb_version": None,
        "scores": {"test": [entry]},
        "evaluation_time": None,
        "kg_co2_emissions": None,
    }


def check_expressible(protocol: Protocol | None, cleaned_up: bool) -> None:
    """Raises ValueError where the scores would not be those of mteb's tasks."""
    if protocol is None or protocol.name != "mteb" or cleaned_up:
        raise ValueError(
            "`mteb_out`: its files stand for mteb's tasks, so it needs `protocol` mteb and no "
            "`clean_up`"
        )


def check_own_text(sets: Sequence[LoadedSet | SetScore]) -> None:
    """Raises ValueError where a set is in another text than mteb's, so its score is not of it."""
    other = [entry.name for entry in sets if not entry.own_text]
    if other:
        raise ValueError(
            f"`mteb_out`: {', '.join(other)}: the text at hand is not that of mteb's task; leave "
            f"{'it' if len(other) == 1 else 'them'} out with -s (name the other sets)"
        )


def write_task_results(report: StsReport, folder: Path) -> list[Path]:
    """Write FOLDER/TASK.json for each set; the files' paths.

    Raises:
        ValueError: the report is not of the mteb protocol, or not of its texts.
    """
    check_expressible(report.protocol, report.cleaned_up)
    check_own_text(report.scores)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for score in report.scores:
        paths.append(folder / f"{task_name(score.name)}.json")
        write_json(paths[-1], as_task_result(score))
    return paths
