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
    with whole_file(text) as partial:
        partial.write_text(markdown(found, drawn), encoding="utf-8")
    return [text, values, *(drawn or [])]


def _draw(found: Report, out: Path) -> list[Path] | None:
    """None without matplotlib. A plot that is not drawn now is no longer this report's."""
    try:
        drawn = plots.draw(found, out)
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
    environment.filters |= {
        "cell": cell,
        "difference": difference,
        "hours": hours,
        "number": number,
        "ours": ours,
        "paragraph": lambda text: " ".join(text.split()),
        "points": points,
        "published": published,
        "share_of": share_of,
    }
    source = resources.files(__package__) / "report.md.j2"
    text = environment.from_string(source.read_text(encoding="utf-8")).render(
        report=report,
        paper=report.paper,
        plots=None if drawn is None else [path.name for path in drawn],
        stages=names,
        files=plots,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return " ".join(text.split()).replace("|", "\\|")


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
