"""Two models on the same pairs: the difference of their scores, with its interval.

Both models are resampled with the same draws, so that what a hard pair does to both cancels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_cft.evaluation.sts import bootstrap
from lowmem_cft.evaluation.sts.bootstrap import Interval
from lowmem_cft.evaluation.sts.correlation import spearman
from lowmem_cft.evaluation.sts.report import StoredReport, read
from lowmem_cft.evaluation.transfer.report import FILE_NAME as TRANSFER_REPORT
from lowmem_cft.files import write_json


@dataclass(frozen=True)
class Difference:
    """Spearman correlations of A and B, and B less A with its 95 % interval."""

    name: str
    num_pairs: int
    a: float
    b: float
    difference: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """Two reports, and their paired differences per set and of the mean."""

    a: StoredReport
    b: StoredReport
    num_resamples: int
    sets: list[Difference]
    mean: Difference

    def to_json(self) -> dict[str, Any]:
        """JSON values: correlations -1 to 1; `difference` is B less A."""
        return {
            **{
                side: {
                    "model": report.model,
                    "report": str(report.path),
                    "float32": report.float32,
                }
                for side, report in (("a", self.a), ("b", self.b))
            },
            "protocol": self.a.label,
            "complete": self.a.complete,
            "mean": asdict(self.mean),
            "sets": [
                {**asdict(entry), "pairs_sha256": sha256}
                for entry, sha256 in zip(self.sets, self.a.sha256, strict=True)
            ],
            "bootstrap": bootstrap.describe(self.num_resamples),
        }

    def write(self, path: str | PathLike[str]) -> None:
        """Write it as JSON, never half of it."""
        write_json(Path(path), self.to_json())


def _reports(place: Path) -> dict[str, Path]:
    """STS reports by name: those of a run's folder, or the file itself."""
    if not place.exists():
        raise ValueError(f"no such run folder or report: {place}")
    files = [place]
    if place.is_dir():
        reports = sorted(place.glob("eval*.json"))
        files = [file for file in reports if not file.name.startswith(TRANSFER_REPORT)]
    if not files:
        raise ValueError(
            f"{place} holds no report of STS sets (eval*.json); write one with "
            f"`lowmem-cft eval {place}`"
        )
    return {file.name: file for file in files}


def find_reports(a: Path, b: Path) -> tuple[Path, Path]:
    """The reports to compare: each side's only one, else the one whose name both have.

    Raises:
        ValueError: a place holds no report, a file is none of STS sets, or several pairs of
            reports could be meant.
    """
    of_a, of_b = _reports(a), _reports(b)
    if len(of_a) == len(of_b) == 1:
        return next(iter(of_a.values())), next(iter(of_b.values()))
    common = of_a.keys() & of_b.keys()
    if len(common) == 1:
        name = common.pop()
        return of_a[name], of_b[name]
    for place in (a, b):
        if place.is_file():
            read(place)  # it may be no report of STS sets, and then says so
    listed = "; ".join(f"{place}: {', '.join(names)}" for place, names in ((a, of_a), (b, of_b)))
    why = "several reports could be meant" if common else "no report of the same name in both"
    raise ValueError(f"{why} ({listed}); name the two files")


def _check_comparable(a: StoredReport, b: StoredReport) -> None:
    """Raises ValueError where the two are not of the same protocol, sets and pairs."""
    if a.label != b.label:
        raise ValueError(
            f"different protocols: {a.path} has {a.label!r}, {b.path} has {b.label!r}; score both "
            "models with the same `protocol` and `clean_up`"
        )
    if sorted(a.names) != sorted(b.names):
        only = sorted(set(a.names) ^ set(b.names))
        raise ValueError(
            f"different sets: {', '.join(only)} stand in one of {a.path} and {b.path} only; score "
            "both models on the same sets"
        )
    other = dict(zip(b.names, b.sha256, strict=True))
    for name, sha256 in zip(a.names, a.sha256, strict=True):
        if sha256 != other[name]:
            raise ValueError(
                f"{name}: different pairs: sha256 {sha256[:12]} in {a.path}, {other[name][:12]} in "
                f"{b.path}; score both models on the same data"
            )


def compare(path_a: Path, path_b: Path, num_resamples: int = bootstrap.RESAMPLES) -> Comparison:
    """Paired differences, B less A, per set and of the mean (stratified by set).

    Raises:
        ValueError: a report is missing or damaged, or the two cannot be compared.
    """
    a, b = (read(path) for path in find_reports(path_a, path_b))
    _check_comparable(a, b)
    sets, draws = [], []
    for i, name in enumerate(a.names):
        gold_P, k = a.golds[i], b.names.index(name)
        cosines = [a.cosines[i], b.cosines[k]]
        drawn_B = np.diff(
            bootstrap.resampled_spearman(name, gold_P, cosines, num_resamples), axis=0
        )[0]
        score_a, score_b = (spearman(cosine_P, gold_P) for cosine_P in cosines)
        interval = bootstrap.interval(drawn_B)
        sets.append(Difference(name, len(gold_P), score_a, score_b, score_b - score_a, interval))
        draws.append(drawn_B)
    mean_a, mean_b = (float(np.mean([getattr(s, side) for s in sets])) for side in "ab")
    mean = Difference(
        "mean",
        sum(entry.num_pairs for entry in sets),
        mean_a,
        mean_b,
        mean_b - mean_a,
        bootstrap.interval(np.mean(draws, axis=0)),
    )
    return Comparison(a, b, num_resamples, sets, mean)
