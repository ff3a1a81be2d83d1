"""The report of a reproduction, from its records alone: report.md, report.json and plots.

Nothing is computed anew but intervals of differences; stages that were not run are named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lowmem_cft.files import whole_file, write_json
from lowmem_cft.papers.records import Records
from lowmem_cft.papers.report import plots as reproduce_plots
from lowmem_cft.papers.report.markdown import markdown
from lowmem_cft.papers.report.summary import Report, summarise

FOLDER = "report"

UNITS = {
    "sts, ablations": "Spearman x 100",
    "transfer": "accuracy in percent",
    "search.trials, trainings.*.curve": "Spearman, -1 to 1",
}


def write_report(folder: Path) -> list[Path]:
    """Write FOLDER/report/: report.md, report.json, and the plots if matplotlib is installed.

    The files follow from the folder's records alone: written again, they are the same.

    Returns:
        The files written.

    Raises:
        ValueError: the folder has no `reproduction.json`, or a record is damaged.
    """
    found = summarise(Records(folder))
    out = folder / FOLDER
    out.mkdir(exist_ok=True)
    drawn = _draw(found, out)
    text, values = out / "report.md", out / "report.json"
    write_json(values, as_json(found))
    plots = None if drawn is None else [path.name for path in drawn]
    with whole_file(text) as partial:
        partial.write_text(markdown(found, plots), encoding="utf-8")
    return [text, values, *(drawn or [])]


def _draw(found: Report, out: Path) -> list[Path] | None:
    """None without matplotlib. A plot that is not drawn now is no longer this report's."""
    try:
        drawn = reproduce_plots.draw(found, out)
    except ImportError:
        drawn = None
    for name in reproduce_plots.NAMES:
        if out / name not in (drawn or []):
            (out / name).unlink(missing_ok=True)
    return drawn


_REPORTED = {
    "data": ("sources", "rows", "published_rows", "distinct_texts", "texts_in_evaluation"),
    "source": ("path", "rows", "sha256"),
    "training": (
        *("run", "steps", "published_steps", "learning_rate", "logical_batch", "rows", "losses"),
        *("curve", "metrics"),
    ),
    "metrics": ("train_seconds", "rows_per_s", "peak_bytes", "plan", "device"),
}
"""What report.json has of results; their own files have all."""


def as_json(found: Report) -> dict[str, Any]:
    """The whole report as JSON values."""
    values: dict[str, Any] = TypeAdapter(Report).dump_python(found, mode="json")
    dates = found.dates
    values["reproduction"].pop("request")
    for training in values["trainings"].values():
        training["metrics"] = _picked(training["metrics"], "metrics")
    values["trainings"] = {
        name: _picked(training, "training") for name, training in values["trainings"].items()
    }
    if found.data is not None:
        values["data"] = _picked(values["data"], "data")
        values["data"]["sources"] = [
            _picked({**source.model_dump(), "path": source.name}, "source")
            for source in found.data.sources
        ]
    return {
        "units": UNITS,
        "seconds": found.seconds,
        "began": None if dates is None else dates[0].isoformat(),
        "finished": None if dates is None else dates[1].isoformat(),
        **values,
    }


def _picked(values: dict[str, Any], what: str) -> dict[str, Any]:
    return {key: values[key] for key in _REPORTED[what]}
