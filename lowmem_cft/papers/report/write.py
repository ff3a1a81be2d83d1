"""The report of a reproduction, from its records alone: report.md, report.json and plots.

Nothing is computed anew but intervals of differences; stages that were not run are named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from pydantic import TypeAdapter

from lowmem_cft.files import whole_file, write_json
from lowmem_cft.papers import names
from lowmem_cft.papers.published import Figure
from lowmem_cft.papers.records import Records
from lowmem_cft.papers.report import plots
from lowmem_cft.papers.report.figures import Score
from lowmem_cft.papers.report.summary import Report, summarise

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
    report = summarise(Records(folder))
    out = folder / "report"
    out.mkdir(exist_ok=True)
    drawn = _draw(report, out)
    text, values = out / "report.md", out / "report.json"
    write_json(values, as_json(report))
    with whole_file(text) as partial:
        partial.write_text(markdown(report, drawn), encoding="utf-8")
    return [text, values, *(drawn or [])]


def _draw(report: Report, out: Path) -> list[Path] | None:
    """None without matplotlib. A plot that is not drawn now is no longer this report's."""
    try:
        drawn = plots.draw(report, out)
    except ImportError:
        drawn = None
    for name in plots.NAMES:
        if out / name not in (drawn or []):
            (out / name).unlink(missing_ok=True)
    return drawn


# --- Markdown -----------------------------------------------------------------------------


def markdown(report: Report, drawn: Sequence[Path] | None) -> str:
    """The whole text, by the template.

    Args:
        drawn: the plots that lie beside it; None without matplotlib.
    """
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    filters = (cell, difference, hours, number, ours, paragraph, points, published, share_of)
    environment.filters |= {function.__name__: function for function in filters}
    source = resources.files(__package__) / "report.md.j2"
    text = environment.from_string(source.read_text(encoding="utf-8")).render(
        report=report,
        paper=report.paper,
        plots=None if drawn is None else [path.name for path in drawn],
        stages=names,
        files=plots,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def paragraph(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return paragraph(text).replace("|", "\\|")


def number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def points(values: tuple[float, float, float], sign: str = "") -> str:
    """A value with its interval, times 100."""
    value, low, high = (100 * v for v in values)
    return _with_interval(value, low, high, sign)


def _with_interval(value: float, low: float | None, high: float | None, sign: str) -> str:
    if low is None or high is None:
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def ours(score: Score | None) -> str:
    """A score with its interval, marked where it is not on the whole set."""
    if score is None:
        return "not run"
    return _with_interval(score.value, score.low, score.high, "") + ("" if score.whole else " §")


def difference(score: Score | None) -> str:
    return "-" if score is None else _with_interval(score.value, score.low, score.high, "+")


def published(figure: Figure | None, bug: str | None = None) -> str:
    """A published figure, marked where it is not verified or rests on a bug."""
    if figure is None:
        return "-"
    marks = "†" * (not figure.verified) + "‡" * bool(bug)
    return f"{figure.value:.2f} {marks}".rstrip()


def share_of(part: int, whole: int) -> str:
    """`300 of 4,594 (6.5 %)`."""
    percent = 100 * part / whole
    if part < whole:
        percent = min(percent, 99.9)  # all of it is said of all of it only
    digits = f"{percent:.1f}".removesuffix(".0") if percent >= 10 else f"{percent:.2g}"
    return f"{part:,} of {whole:,} ({digits} %)"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 360 else f"{seconds:.0f} seconds"


# --- JSON ---------------------------------------------------------------------------------

# what report.json has of records, whose own files have all
_OF_STAGE = ("name", "kind", "what", "inputs_sha256", "seconds", "flops", "finished", "versions")
_OF_TRAINING = (
    *("run", "steps", "published_steps", "learning_rate", "logical_batch", "rows", "losses"),
    *("curve", "metrics"),
)
_OF_METRICS = ("train_seconds", "rows_per_s", "peak_bytes", "plan", "device")
_OF_DATA = ("sources", "rows", "published_rows", "distinct_texts", "texts_in_evaluation")


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as JSON values."""
    values: dict[str, Any] = TypeAdapter(Report).dump_python(report, mode="json")
    values["reproduction"].pop("request")
    values["stages"] = [_picked(stage, _OF_STAGE) for stage in values["stages"]]
    for stage in values["stages"]:
        stage["flops"] = stage["flops"] or None
    for name, training in values["trainings"].items():
        training["metrics"] = _picked(training["metrics"], _OF_METRICS)
        values["trainings"][name] = _picked(training, _OF_TRAINING)
    if report.data is not None:
        values["data"] = _picked(values["data"], _OF_DATA)
        values["data"]["sources"] = [
            {"path": source.name, "rows": source.rows, "sha256": source.sha256}
            for source in report.data.sources
        ]
    began, finished = (date.isoformat() for date in report.dates) if report.dates else (None, None)
    times = {"seconds": report.seconds, "began": began, "finished": finished}
    return {"units": UNITS, **times, **values}


def _picked(values: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys}
