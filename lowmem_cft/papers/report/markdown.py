"""The report of a reproduction as Markdown: what it is, ours beside the published figures, notes."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_cft.papers.published import Figure, Published
from lowmem_cft.papers.report import plots, sections
from lowmem_cft.papers.report.figures import Row
from lowmem_cft.papers.report.summary import Report
from lowmem_cft.papers.report.text import (
    BUG,
    CUT,
    NONE,
    UNVERIFIED,
    difference,
    hours,
    ours,
    published,
    share_of,
    table,
    text_table,
)


def markdown(found: Report, drawn: Sequence[str] | None) -> str:
    """The whole text.

    Args:
        drawn: names of the plots that lie beside it; None without matplotlib.
    """
    asked = found.reproduction
    parts = [
        [f"# Reproduction: {asked.paper}, {found.model_name}"],
        _what(found),
        _circumstances(found),
        _sts(found),
        _plot(drawn, plots.SETS, "Scores set by set, before and after"),
        _notes(found),
        _others(found),
        sections.demonstrations(found),
        sections.ablations(found),
        sections.efficiency(found),
        _plot(drawn, plots.EFFICIENCY, "Score by optimizer step"),
        sections.trainings(found),
        _plot(drawn, plots.LOSSES, "Training loss by optimizer step"),
        _transfer(found),
        sections.data(found),
        sections.stages(found),
        _not_done(found),
    ]
    if drawn is None:
        parts.append(
            [
                "## Plots",
                "",
                "Missing: matplotlib is not installed. `pip install '.[plots]'`, then give "
                "the command again: it repeats no stage and writes this report anew.",
            ]
        )
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


# --- what it is ---------------------------------------------------------------------------


def _what(found: Report) -> list[str]:
    """Which share of the published run this is, in one paragraph."""
    asked, facts = found.reproduction, found.facts
    own = asked.model in facts.models
    said = [
        f"*{facts.title}* (arXiv {facts.arxiv}) with {found.model_name}"
        + (", by this project's own code." if own else ", which is **no model of the paper**.")
    ]
    share = asked.share
    if share.training_steps is not None:
        said.append(_steps(found, "Training", "train", share.training_steps))
    if share.ablation_steps is not None:
        done = [one.name for one in found.ablations.others]
        name = done[0] if done else found.paper.ablations_from(asked.ablation_baseline)[0]
        said.append(_steps(found, "An ablation", name, share.ablation_steps))
    if found.data is not None:
        said.append(f"The data: {share_of(found.data.rows, found.data.published_rows)} rows.")
    if share.icl_pairs is not None and found.search is not None:
        said.append(f"The search for a demonstration: {share_of(*share.icl_pairs)} pairs.")
    if found.transfer is not None and any(row.ours for row in found.transfer.rows):
        rows = share.transfer_rows_per_split
        said.append(
            "Transfer tasks: "
            + ("all rows." if rows is None else f"at most {rows:,} rows of a split.")
        )
    limits = [] if share.hours is None else [f"{share.hours:g} h"]
    limits += [] if share.budget is None else [f"{share.budget} of memory"]
    said.append(f"Asked for: {' and '.join(limits) or 'the whole run, without limits'}.")
    planned = len(found.paper.own_stages(asked.ablation_baseline))
    said.append(f"Done: {planned - len(found.not_run)} of the paper's {planned} stages.")
    return [" ".join(said)]


def _steps(found: Report, what: str, stage: str, planned: tuple[int, int | None]) -> str:
    """Steps done if they are, else planned, of those published."""
    training = found.trainings.get(stage)
    steps = planned[0] if training is None else training.steps
    of = f"{steps:,}" if not planned[1] else f"{share_of(steps, planned[1])}"
    note = "planned, not done yet" if training is None else "done"
    of_what = "the published" if stage != "train" else found.paper.published_length
    return f"{what}: {of} of {of_what} optimizer steps, {note}."


def _circumstances(found: Report) -> list[str]:
    asked, dates = found.reproduction, found.dates
    rows = [("last command", f"`{asked.command}`"), ("recipe", asked.recipe)]
    if dates is not None:
        rows.append(("dates", f"{dates[0]:%Y-%m-%d %H:%M} to {dates[1]:%Y-%m-%d %H:%M %Z}"))
        rows.append(("time in stages", hours(found.seconds)))
    rows += list(asked.machine.items())
    rows.append(("versions", _versions(found) or NONE))
    return ["## Machine, versions, command", "", *text_table(("what", "value"), rows)]


def _versions(found: Report) -> str:
    """Of what the stages were run with; several where they were updated between."""
    seen: dict[str, list[str]] = {}
    for versions in [one.versions for one in found.stages if one.versions] or [
        found.reproduction.versions
    ]:
        for name, version in versions.items():
            seen.setdefault(name, [])
            seen[name] += [version] if version not in seen[name] else []
    return ", ".join(f"{name} {' and '.join(versions)}" for name, versions in seen.items())


# --- set by set ---------------------------------------------------------------------------


def _sts(found: Report) -> list[str]:
    """Ours beside the published figures; a model of its own has no published columns."""
    sts = found.sts
    own = found.reproduction.model in found.facts.models
    header = ["set", "pairs"]
    for side in sts.sides:
        header += [f"{side}, ours", f"{side}, published"][: 1 + own]
    header += [f"{side} - base, ours" for side in sts.sides[1:]]
    rows = []
    for row in (*sts.rows, sts.mean):
        cells = [row.name, NONE if row.pairs is None else f"{row.pairs:,}"]
        for side in sts.sides:
            cells.append(ours(row.ours.get(side)))
            cells += [published(row.published.get(side), sts.bugs.get(side, ""))] * own
        cells += [difference(row.differences.get(side)) for side in sts.sides[1:]]
        rows.append(cells if row is not sts.mean else [f"**{cells[0]}**", *cells[1:]])
    lines = [
        "## Set by set",
        "",
        f"Spearman x 100, protocol {sts.protocol}, with 95 % intervals in brackets; "
        "differences are paired, on the same pairs.",
    ]
    if not own:
        lines += [f"The paper has no figures of {found.model_name}; no published one belongs here."]
    return [*lines, "", *table(header, rows)]


def _notes(found: Report) -> list[str]:
    """What the marks stand for, where the figures come from, what cannot be compared."""
    sts, transfer = found.sts, found.transfer
    rows = [*sts.rows, sts.mean]
    tasks = [] if transfer is None else [*transfer.rows, transfer.mean]
    figures = [(side, row.name, one) for row in rows for side, one in row.published.items()]
    figures += [("transfer", row.name, one) for row in tasks for one in row.published.values()]
    lines = _marks(found, [figure for _, _, figure in figures])
    if any(not one.whole for row in (*rows, *tasks) for one in row.ours.values()):
        lines.append(
            f"- {CUT} Not the protocol's whole set: fewer pairs, rows or sets than published, or "
            "another text. The published figure is of another test then."
        )
    lines.append(f"- `{NONE}` Not published, or not known.")
    sides_of: dict[str, list[str]] = {}
    for side, _, figure in figures:
        if figure.verified and side not in sides_of.setdefault(figure.source, []):
            sides_of[figure.source].append(side)
    lines += [f"- Published ({', '.join(s)}): {source}." for source, s in sides_of.items()]
    lines += [
        f"- Published ({side}, {name}): {one.note}." for side, name, one in figures if one.note
    ]
    lines += [f"- Published ({side}): {note}" for side, note in sts.row_notes.items()]
    if transfer is not None and transfer.row_note:
        lines.append(f"- Published (transfer): {transfer.row_note}")
    lines += [f"- **Warning**: {problem}" for problem in sts.problems]
    if found.resamples:
        times = " or ".join(f"{count:,}" for count in found.resamples)
        lines.append(
            f"- Intervals: percentiles over {times} resamples of a set's pairs. They cover the "
            "choice of pairs; each model was trained once, so not that of a seed."
        )
    lines += [f"- {note}" for note in found.facts.notes]
    return ["### Notes", "", *lines]


def _marks(found: Report, figures: Sequence[Figure]) -> list[str]:
    """Why a published figure is not to be trusted as it stands."""
    everywhere = [*figures, *(one for other in found.others for one in _all(other.row))]
    unverified = sorted({one.source for one in everywhere if not one.verified})
    lines = []
    if unverified:
        lines.append(f"- {UNVERIFIED} Not verified: {'; '.join(unverified)}.")
    return lines + [f"- {BUG} {side}: a known bug. {bug}" for side, bug in found.sts.bugs.items()]


def _all(row: Published) -> list[Figure]:
    return [*row.sets.values(), *([row.mean] if row.mean else [])]


def _others(found: Report) -> list[str]:
    """Fine-tuned figures of the paper's own models."""
    if not found.others:
        return []
    rows = []
    for row in (*found.sts.rows, found.sts.mean):
        cells = [row.name, ours(row.ours.get("trained"))]
        for other in found.others:
            figure = other.row.mean if row is found.sts.mean else other.row.sets.get(row.name)
            cells.append(published(figure, other.row.bug))
        rows.append(cells)
    header = ["set", f"{found.model_name}, trained, ours"]
    header += [f"{other.name} (another model), published" for other in found.others]
    bugs = [f"- {BUG} {o.name}: a known bug. {o.row.bug}" for o in found.others if o.row.bug]
    return [
        "## Other models, for orientation only",
        "",
        f"No fine-tuned figures of {found.model_name} are published. These are of other, mostly "
        "larger models after training: nothing here is reproduced by being near to them.",
        "",
        *table(header, rows),
        *([""] if bugs else []),
        *bugs,
    ]


# --- transfer -----------------------------------------------------------------------------


def _transfer(found: Report) -> list[str]:
    transfer = found.transfer
    if transfer is None:
        return []
    own = any(row.published for row in transfer.rows)
    header = ["task", "test rows", "base, ours", *["base, published"] * own, "trained, ours"]
    rows = []
    for row in (*transfer.rows, transfer.mean):
        gain = row.differences.get("trained")
        cells = [row.name, NONE if row.pairs is None else f"{row.pairs:,}", _side(row, "base")]
        cells += [published(row.published.get("base"))] * own
        rows.append([*cells, _side(row, "trained"), difference(gain)])
    lines = [
        "## Transfer tasks",
        "",
        "Accuracy in percent. The intervals are binomial (Wilson), of the test rows as independent "
        "draws; differences have none, and the published figures are without training.",
    ]
    lines += [f"Protocol: {protocol}." for protocol in transfer.protocols]
    return [*lines, "", *table([*header, "trained - base"], rows)]


def _side(row: Row, side: str) -> str:
    return ours(row.ours.get(side))


# --- plots and the rest -------------------------------------------------------------------


def _plot(drawn: Sequence[str] | None, name: str, what: str) -> list[str]:
    return [f"![{what}]({name})"] if name in (drawn or ()) else []


def _not_done(found: Report) -> list[str]:
    """Stages without a record, and where this run departs from the paper."""
    lines = ["## What was not done, and what differs from the paper", ""]
    if found.not_run:
        lines.append(f"- Stages not run: {', '.join(found.not_run)}.")
    if found.beyond_not_run:
        lines.append(f"- Beyond the paper, and not run either: {', '.join(found.beyond_not_run)}.")
    lines += [f"- {departure}" for departure in found.reproduction.departures]
    if len(lines) == 2:
        lines.append("Nothing is recorded.")
    return lines
