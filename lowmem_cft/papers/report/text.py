"""Numbers, marks and tables as the Markdown of a report has them."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_cft.papers.published import Figure
from lowmem_cft.papers.report.figures import Score

UNVERIFIED, BUG, CUT = "†", "‡", "§"
NOT_RUN, NONE = "not run", "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its first column on the left and the others on the right."""
    lines = [" | ".join(header), " | ".join([":--"] + ["--:"] * (len(header) - 1))]
    lines += [" | ".join(cell(text) for text in row) for row in rows]
    return [f"| {line} |" for line in lines]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The same with every column on the left."""
    lines = table(header, rows)
    lines[1] = "| " + " | ".join([":--"] * len(header)) + " |"
    return lines


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def ours(score: Score | None) -> str:
    """A score with its interval, marked where it is not on the whole set."""
    if score is None:
        return NOT_RUN
    mark = "" if score.whole else f" {CUT}"
    return f"{score.value:.2f}{_interval(score, '')}{mark}"


def difference(score: Score | None) -> str:
    return NONE if score is None else f"{score.value:+.2f}{_interval(score, '+')}"


def _interval(score: Score, sign: str) -> str:
    if score.low is None or score.high is None:
        return ""
    return f" ({score.low:{sign}.2f} to {score.high:{sign}.2f})"


def published(figure: Figure | None, bug: str = "") -> str:
    """A published figure with what speaks against it."""
    if figure is None:
        return NONE
    mark = UNVERIFIED * (not figure.verified) + BUG * bool(bug)
    return f"{figure.value:.2f}{f' {mark}' if mark else ''}"


def share_of(part: int, whole: int) -> str:
    """`300 of 4,594 (6.5 %)`."""
    percent = 100 * part / whole
    if part < whole:
        percent = min(percent, 99.9)  # all of it is said of all of it only
    digits = f"{percent:.1f}".removesuffix(".0") if percent >= 10 else f"{percent:.2g}"
    return f"{part:,} of {whole:,} ({digits} %)"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} hours" if seconds >= 360 else f"{seconds:.0f} seconds"
