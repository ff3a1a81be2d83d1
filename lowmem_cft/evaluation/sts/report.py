"""A model's scores on several sets as one report: table rows, JSON, and the pairs behind them.

Beside NAME.json lies NAME.npz with every pair's cosine and gold score, which a comparison of two
models resamples.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_cft.evaluation.clean_up import NAME as CLEAN_UP
from lowmem_cft.evaluation.sts import bootstrap
from lowmem_cft.evaluation.sts.bootstrap import Interval
from lowmem_cft.evaluation.sts.correlation import Floats, spearman
from lowmem_cft.evaluation.sts.protocols import SCORED, SETS, Protocol
from lowmem_cft.evaluation.sts.score import ScoredSet, SetScore
from lowmem_cft.evaluation.sts.sets import DIGITS
from lowmem_cft.files import short_name, whole_file, write_json
from lowmem_cft.machine import library_versions

_ROUNDING = 1e-9
"""Largest difference allowed between a stored score and the score of its pairs."""


@dataclass(frozen=True)
class StsReport:
    """Scores, their mean, and 95 % intervals of each Spearman correlation and of the mean."""

    model: str
    protocol: Protocol | None
    cleaned_up: bool
    float32: bool
    """Computed in float32; else as the model's own dtype has it."""
    num_resamples: int
    sets: list[ScoredSet]
    intervals: list[Interval]
    mean_interval: Interval

    @property
    def scores(self) -> list[SetScore]:
        return [scored.score for scored in self.sets]

    @property
    def mean(self) -> float:
        """Plain mean of the sets' Spearman correlations."""
        return float(np.mean([score.spearman for score in self.scores]))

    @property
    def mean_pearson(self) -> float:
        return float(np.mean([score.pearson for score in self.scores]))

    @property
    def complete(self) -> bool:
        """Whether all sets of a protocol are there, so that the mean is the protocol's."""
        return self.protocol is not None and len(self.sets) == len(self.protocol.sets)

    @property
    def file_name(self) -> str:
        """In a run's folder; a report of other sets or options never replaces this one."""
        parts = ["eval", "sts" if self.protocol is None else self.protocol.name]
        if not self.complete:
            parts += ["partial"] * (self.protocol is not None)
            parts.append(short_name(sorted(_name_of(scored) for scored in self.sets)))
        parts += ["clean-up"] * self.cleaned_up + ["float32"] * self.float32
        return "-".join(parts) + ".json"

    @property
    def label(self) -> str:
        """What is scored and by which protocol, if any, with what departs from it."""
        label = SCORED if self.protocol is None else self.protocol.scored
        return f"{label}, {CLEAN_UP}" if self.cleaned_up else label

    def to_json(self) -> dict[str, Any]:
        """The report without the pairs, as JSON values; correlations -1 to 1."""
        return {
            "model": self.model,
            "suite": "sts",
            "protocol": self.label,
            "protocol_name": None if self.protocol is None else self.protocol.name,
            "clean_up": self.cleaned_up,
            "float32": self.float32,
            "complete": self.complete,
            "mean": self.mean,
            "mean_interval": asdict(self.mean_interval),
            "mean_pearson": self.mean_pearson,
            "sets": [
                {
                    **asdict(scored.score),
                    "interval": asdict(interval),
                    "pairs_sha256": scored.sha256,
                }
                for scored, interval in zip(self.sets, self.intervals, strict=True)
            ],
            "bootstrap": bootstrap.describe(self.num_resamples),
            "versions": library_versions(),
        }

    def write(self, path: str | PathLike[str]) -> None:
        """Write PATH and, beside it, the pairs (see `pairs_file`); neither is ever half-written."""
        arrays: dict[str, Any] = {}
        for i, scored in enumerate(self.sets):
            arrays[f"cosine_{i}"], arrays[f"gold_{i}"] = scored.cosine_P, scored.gold_P
        with whole_file(pairs_file(Path(path))) as partial, partial.open("wb") as stream:
            np.savez(stream, **arrays)
        write_json(Path(path), self.to_json())


def _name_of(scored: ScoredSet) -> str:
    """The set's name; of a file its stem, which others may have too, and which pairs are in it."""
    name = scored.score.name
    known = name in SETS or name == "demo"
    return name if known else f"{Path(name).stem}-{scored.sha256[:DIGITS]}"


def report(
    model: str,
    sets: Sequence[ScoredSet],
    *,
    protocol: Protocol | None = None,
    cleaned_up: bool = False,
    float32: bool = False,
    num_resamples: int = bootstrap.RESAMPLES,
    drawn: dict[str, Floats] | None = None,
) -> StsReport:
    """Resample the pairs of every set (at least one), for intervals.

    Args:
        drawn: keeps the resampled correlations by set, where a report grows set by set.
    """
    drawn = {} if drawn is None else drawn
    for s in sets:
        if s.score.name not in drawn:
            drawn[s.score.name] = bootstrap.resampled_spearman(
                s.score.name, s.gold_P, [s.cosine_P], num_resamples
            )[0]
    draws = [drawn[s.score.name] for s in sets]
    return StsReport(
        model,
        protocol,
        cleaned_up,
        float32,
        num_resamples,
        list(sets),
        [bootstrap.interval(values_B) for values_B in draws],
        bootstrap.interval(np.mean(draws, axis=0)),
    )


def pairs_file(path: Path) -> Path:
    """Where the pairs of a report lie."""
    return path.with_suffix(".npz")


@dataclass(frozen=True)
class StoredReport:
    """What a comparison needs of a report on disk."""

    path: Path
    model: str
    label: str
    float32: bool
    complete: bool
    names: list[str]
    sha256: list[str]
    cosines: list[Floats]
    golds: list[Floats]


def read(path: Path) -> StoredReport:
    """A report as `StsReport.write` left it.

    Raises:
        ValueError: it is no STS report of ours, or its pairs are not there or not of this report.
    """
    again = "score the model again with `lowmem-cft eval MODEL --out FILE.json`"
    try:
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.get("suite") == "transfer":
            raise ValueError(f"{path}: a report of transfer tasks; only those of STS are compared")
        listed = values["sets"]
        names = [str(entry["name"]) for entry in listed]
        sha256 = [str(entry["pairs_sha256"]) for entry in listed]
        label, model = str(values["protocol"]), str(values["model"])
        float32, complete = bool(values["float32"]), bool(values["complete"])
        spearmans = [float(entry["spearman"]) for entry in listed]
        sizes = [int(entry["num_pairs"]) for entry in listed]
    except (
        OSError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(f"{path}: no report of `lowmem-cft eval` ({error!r}); {again}") from error
    pairs = pairs_file(path)
    try:
        with np.load(pairs) as arrays:
            cosines = [arrays[f"cosine_{i}"] for i in range(len(names))]
            golds = [arrays[f"gold_{i}"] for i in range(len(names))]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{pairs}: the similarities of every pair, which a comparison resamples, cannot be "
            f"read ({error}); {again}"
        ) from error
    for lengths in ([len(values_P) for values_P in side] for side in (cosines, golds)):
        if lengths != sizes:
            raise ValueError(f"{pairs}: holds {lengths} pairs, {path.name} says {sizes}; {again}")
    for name, cosine_P, gold_P, stored in zip(names, cosines, golds, spearmans, strict=True):
        if abs(_spearman(pairs, name, cosine_P, gold_P) - stored) > _ROUNDING:
            raise ValueError(
                f"{pairs}: its pairs of {name} do not have the score in {path.name}, so they are "
                f"of another model; {again}"
            )
    return StoredReport(path, model, label, float32, complete, names, sha256, cosines, golds)


def _spearman(file: Path, name: str, cosine_P: Floats, gold_P: Floats) -> float:
    try:
        return spearman(cosine_P, gold_P)
    except ValueError as error:
        raise ValueError(f"{file}: {name}: {error}") from None
