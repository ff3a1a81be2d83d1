"""Sections of the report that are about single stages: ablations, data efficiency, demonstrations,
data, the stages themselves."""

from __future__ import annotations

from lowmem_cft.papers.paper import SEARCH, WITH_DEMONSTRATION, Paper
from lowmem_cft.papers.report.ablations import Ablation
from lowmem_cft.papers.report.summary import Report
from lowmem_cft.papers.report.text import (
    NONE,
    NOT_RUN,
    difference,
    hours,
    ours,
    share_of,
    table,
    text_table,
)
from lowmem_cft.papers.results import Search

_TOP = 10
"""Demonstrations in the table; report.json has all."""
_STEPS = 25
"""Rows of the table by step, at most."""

# --- ablations ----------------------------------------------------------------------------


def ablations(found: Report) -> list[str]:
    """A table for each key, then whether that key alone was changed."""
    baseline, others = found.ablations.baseline, found.ablations.others
    if not found.paper.ablations:
        return []
    lines = ["## Ablations", ""]
    if baseline is None and not others:
        return [*lines, "None was run."]
    lines += [
        f"Each is held against `{_baseline(found)}`, on the same pairs. The published "
        "ablations have no figures to put beside them. Each run was trained once: an interval "
        "covers the choice of pairs, not that of a seed.",
    ]
    for key, title in {a.key: a.title for a in found.paper.ablations}.items():
        here = [one for one in others if one.key == key]
        if not here:
            of_key = [a.name for a in found.paper.ablations if a.key == key and a.value is not None]
            names = [name for name in found.not_run if name in of_key]
            if names:
                lines += ["", f"### {title}", "", f"Not run: {', '.join(names)}."]
            continue
        rows = [one for one in (baseline, *here) if one is not None]
        lines += ["", f"### {title}", "", *_ablation_table(key, rows, found), ""]
        lines += [line for one in here for line in _verdict(one)]
    return lines


def _baseline(found: Report) -> str:
    return found.paper.ablations_from(found.reproduction.ablation_baseline)[0]


def _ablation_table(key: str, rows: list[Ablation], found: Report) -> list[str]:
    sets = ", ".join(dict.fromkeys(one.scored_on for one in rows if one.scored_on)) or "no set"
    header = ("run", f"`{key}`", "steps", f"Spearman x 100, {sets}", "difference to baseline")
    baseline = _baseline(found)
    values = _values(key, rows)
    return table(
        header,
        [
            (
                one.name,
                f"`{value}`",
                f"{one.steps:,}",
                ours(one.score),
                "baseline" if one.name == baseline else difference(one.difference),
            )
            for one, value in zip(rows, values, strict=True)
        ],
    )


def _values(key: str, rows: list[Ablation]) -> list[str]:
    """The key's value in each run; the baseline's stands in the changes of the others."""
    known = {change.key: change.baseline for one in rows for change in one.changes}
    return [one.value if one.key == key else known.get(key, "the same") for one in rows]


def _verdict(one: Ablation) -> list[str]:
    lines = []
    for change in one.changes:
        what = f"`{change.key}`: `{change.baseline}` -> `{change.here}`"
        lines.append(f"- {one.name}: {what}{'' if change.named else ' (**not wanted**)'}")
    if one.changes and not one.problems:
        lines[-1] += "; nothing else in the inputs differs."
    lines += [f"- **Warning**, {one.name}: {problem}." for problem in one.problems]
    return lines


# --- by step ------------------------------------------------------------------------------


def efficiency(found: Report) -> list[str]:
    """Score by step of every training run, a table for each set."""
    curves = {
        name: one.curve for name, one in found.trainings.items() if one.curve and one.curve.points
    }
    lines = ["## Data efficiency", ""]
    if not curves:
        return [*lines, "No training run was scored on its way."]
    for set_name in dict.fromkeys(curve.set for curve in curves.values()):
        here = {name: dict(one.points) for name, one in curves.items() if one.set == set_name}
        steps = sorted({step for points in here.values() for step in points})
        stride = -(-len(steps) // _STEPS)
        # the last step always, and from it backwards
        shown = steps[::-1][::stride][::-1]
        lines += [f"Spearman x 100 on {set_name} by optimizer step, without intervals."]
        if stride > 1:
            lines += [f"Every {stride}th step that was scored; report.json has all."]
        rows = [
            (f"{step:,}", *(f"{100 * p[step]:.2f}" if step in p else NONE for p in here.values()))
            for step in shown
        ]
        batches = [f"{name} (batch {found.trainings[name].logical_batch})" for name in here]
        lines += ["", *table(("step", *batches), rows), ""]
    return lines[:-1]


def trainings(found: Report) -> list[str]:
    """What each training run did, how fast, in how much memory."""
    lines = ["## Training runs", ""]
    if not found.trainings:
        return [*lines, "None was done."]
    rows = []
    for name, one in found.trainings.items():
        speed, peak = one.metrics.rows_per_s, one.metrics.peak_bytes
        steps = f"{one.steps:,}"
        if one.published_steps:
            steps = share_of(one.steps, one.published_steps)
        seconds = one.metrics.train_seconds
        rows.append(
            (
                name,
                steps,
                f"{one.logical_batch}",
                f"{one.learning_rate:g}",
                f"{one.rows:,}",
                f"{one.losses[-1][1]:.4f}" if one.losses else NONE,
                NONE if seconds is None else f"{seconds:,.0f}",
                NONE if speed is None else f"{speed:.2f}",
                NONE if peak is None else f"{peak / 2**30:.2f}",
            )
        )
    header = ("run", "steps, of published", "batch", "learning rate", "rows drawn", "last loss")
    lines += table((*header, "seconds", "rows/s", "peak, GiB"), rows)
    return [
        *lines,
        "",
        "Losses with other negatives, prompts or batches are not comparable with each other.",
    ]


# --- demonstrations -----------------------------------------------------------------------


def demonstrations(found: Report) -> list[str]:
    """The best ones, and none; nothing where no search belongs to the paper or was done."""
    if found.search is None and SEARCH not in found.paper.stages:
        return []
    lines = ["## Demonstrations for in-context learning", ""]
    chosen = found.published_demonstration
    if chosen is not None:
        lines += [
            f'The paper chose "{chosen.sentence}" -> {chosen.word} (line {chosen.line} of its 300) '
            f"for {found.model_name}, which improves its mean by {chosen.improve:.2f} points.",
            "",
        ]
    if found.search is None:
        return [*lines, f"The search: {NOT_RUN}."]
    return lines + _search(found.search, found.paper)


def _search(search: Search, paper: Paper) -> list[str]:
    with_one = [trial for trial in search.trials if trial.sentence is not None]
    helpful = sum(trial.gain > 0 for trial in with_one)
    lines = [
        f"{len(with_one)} demonstrations were tried on {search.pairs:,} pairs of {search.set}; "
        f"{helpful} score higher than no demonstration. The best one is chosen on these very pairs, "
        "so its score here flatters it: "
        + (
            "what it does on the other sets stands above."
            if WITH_DEMONSTRATION in paper.stages
            else "it was not scored on others."
        ),
        "",
    ]
    rows = []
    for place, trial in enumerate(search.trials, 1):
        plain = trial.sentence is None
        if place > _TOP and not plain:
            continue
        gain = (
            f"{100 * trial.gain:+.2f} ({100 * trial.gain_low:+.2f} to {100 * trial.gain_high:+.2f})"
        )
        rows.append(
            (
                "none" if plain else f"{trial.sentence} -> {trial.word}",
                str(place),
                f"{100 * trial.spearman:.2f} ({100 * trial.low:.2f} to {100 * trial.high:.2f})",
                NONE if plain else gain,
            )
        )
    lines += table(("demonstration", "place", "Spearman x 100", "gain, paired"), rows)
    return [*lines, "", f"The template chosen: `{search.best_template}`"]


# --- data and stages ----------------------------------------------------------------------


def data(found: Report) -> list[str]:
    """What was trained on, with checksums."""
    lines = ["## Training data", ""]
    if found.data is None:
        return [*lines, f"The stage `data`: {NOT_RUN}."]
    one = found.data
    lines += [
        f"{share_of(one.rows, one.published_rows)} of the published number of rows; "
        f"{one.distinct_texts:,} distinct texts, of which {one.texts_in_evaluation:,} stand word for "
        "word in the sets that are scored.",
        "",
    ]
    rows = [
        (source.name, f"{source.rows:,}", f"`{source.sha256}`" if source.sha256 else NONE)
        for source in one.sources
    ]
    return lines + text_table(("source", "rows", "sha256"), rows)


def stages(found: Report) -> list[str]:
    """Every stage that was run."""
    lines = ["## Stages", ""]
    if not found.stages:
        return [*lines, "None was run yet."]
    rows = [
        (
            one.name,
            one.what,
            f"{one.seconds:,.0f}",
            NONE if one.flops is None else f"{one.flops / 1e12:,.3g}",
            f"{one.finished:%Y-%m-%d %H:%M}",
            f"`{one.inputs_sha256}`",
        )
        for one in found.stages
    ]
    header = ("stage", "what", "seconds", "TFLOP (estimate)", "finished", "sha256 of its inputs")
    return [*lines, *text_table(header, rows), "", f"In all {hours(found.seconds)}."]
