"""Plots of a reproduction, as PNG. matplotlib is the extra `plots`, imported only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lowmem_cft.evaluation.sts.correlation import Floats
from lowmem_cft.files import whole_file
from lowmem_cft.papers.report.figures import Row
from lowmem_cft.papers.report.summary import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETS, EFFICIENCY, LOSSES = NAMES = ("sets.png", "data-efficiency.png", "losses.png")

# Okabe and Ito's palette, told apart with any colour vision (Color Universal Design, 2008).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
# a curve of losses is a running mean that leaves about so many independent points
_POINTS = 50


def draw(report: Report, out: Path) -> list[Path]:
    """Those plots that there are figures for.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    drawn = []
    with matplotlib.rc_context(
        {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
    ):
        for name, plot in ((SETS, _sets), (EFFICIENCY, _efficiency), (LOSSES, _losses)):
            figure = Figure(figsize=(10, 5.5), layout="constrained")
            if not plot(report, figure):
                continue
            with whole_file(out / name) as partial:
                figure.savefig(partial, format="png", dpi=120)
            drawn.append(out / name)
    return drawn


def _sets(report: Report, figure: Figure) -> bool:
    """Ours as bars with intervals, published figures as diamonds: hollow where not verified."""
    table = report.sts
    rows = [row for row in (*table.rows, table.mean) if row.ours]
    sides = [side for side in table.sides if any(side in row.ours for row in rows)]
    if not sides:
        return False
    axes = figure.subplots()
    width = 0.8 / len(sides)
    for i, side in enumerate(sides):
        left = (i - (len(sides) - 1) / 2) * width
        _bars(axes, rows, side, left, 0.92 * width, _COLORS[i])
        bug = ", known bug" if side in table.bugs else ""
        known = [
            (k + left, row.published[side]) for k, row in enumerate(rows) if side in row.published
        ]
        for verified, note in ((True, bug), (False, f"{bug}, source not verified")):
            points = [(x, figure.value) for x, figure in known if figure.verified is verified]
            if points:
                color = _COLORS[i] if verified else "white"
                _diamonds(axes, points, color, f"{side}, published{note}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.name for row in rows], rotation=30, ha="right")
    axes.set_ylabel("Spearman correlation x 100")
    axes.set_title(f"{report.model_name}: before and after")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return True


def _bars(
    axes: Axes, rows: Sequence[Row], side: str, left: float, width: float, color: str
) -> None:
    scored = [(k + left, row.ours[side]) for k, row in enumerate(rows) if side in row.ours]
    # an interval of resamples need not hold the score itself
    below = [0.0 if s.low is None else max(0.0, s.value - s.low) for _, s in scored]
    above = [0.0 if s.high is None else max(0.0, s.high - s.value) for _, s in scored]
    axes.bar(
        [x for x, _ in scored],
        [s.value for _, s in scored],
        width,
        yerr=[below, above],
        capsize=3,
        color=color,
        label=f"{side}, ours (95 % interval)",
    )


def _diamonds(axes: Axes, points: Sequence[tuple[float, float]], color: str, label: str) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "D", markersize=7, markerfacecolor=color, markeredgecolor="black", label=label)


def _efficiency(report: Report, figure: Figure) -> bool:
    """Score by step of every training stage, a panel for each set."""
    curves = {name: training.curve for name, training in report.trainings.items() if training.curve}
    sets = list(dict.fromkeys(curve.set for curve in curves.values()))
    if not sets:
        return False
    panels: Sequence[Axes] = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, set_name in zip(panels, sets, strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            if curve.set == set_name and curve.points:
                steps, values = zip(*curve.points, strict=True)
                axes.plot(
                    steps,
                    [100 * value for value in values],
                    _LINES[i % len(_LINES)],
                    color=_COLORS[i % len(_COLORS)],
                    marker="o",
                    markersize=4,
                    label=name,
                )
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(f"Spearman correlation x 100, {set_name}")
        axes.legend(frameon=False)
    figure.suptitle(f"{report.model_name}: data efficiency")
    return True


def running_mean(values: Sequence[float], width: int) -> Floats:
    """The mean of each value and those before it, `width` in all or fewer at the beginning."""
    sums = np.convolve(values, np.ones(width))[: len(values)]
    return sums / np.minimum(np.arange(1, len(values) + 1), width)


def _losses(report: Report, figure: Figure) -> bool:
    """Training loss by step, smoothed over the values before."""
    trainings = {
        name: training.losses for name, training in report.trainings.items() if training.losses
    }
    if not trainings:
        return False
    axes = figure.subplots()
    for i, (name, losses) in enumerate(trainings.items()):
        width = max(1, len(losses) // _POINTS)
        axes.plot(
            [step for step, _ in losses],
            running_mean([loss for _, loss in losses], width),
            _LINES[i % len(_LINES)],
            color=_COLORS[i % len(_COLORS)],
            label=name if width == 1 else f"{name} (running mean of {width})",
        )
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("contrastive loss, nats")
    axes.set_title(f"{report.model_name}: training loss")
    axes.legend(frameon=False)
    return True
