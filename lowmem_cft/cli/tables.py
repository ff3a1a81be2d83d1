"""Results as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lowmem_cft.evaluation.clean_up import NAME as CLEAN_UP
from lowmem_cft.evaluation.search.trials import Trial
from lowmem_cft.evaluation.sts.compare import Comparison
from lowmem_cft.evaluation.sts.report import StsReport
from lowmem_cft.evaluation.sts.score import SetScore
from lowmem_cft.evaluation.sts.sets import DIGITS
from lowmem_cft.evaluation.transfer.report import TransferReport
from lowmem_cft.planning.recipe_plan import RecipePlan
from lowmem_cft.units import GIB

_PARTS = {
    "weights_4bit": "weights of the base, in 4 bits",
    "weights": "weights of the base that stay in more bits",
    "adapter": "the weights that are trained",
    "gradients": "their gradients",
    "optimizer": "its averages of them",
    "context": "the libraries' own, before any tensor",
    "index": "which text is whose",
    "embeddings": "vectors of all texts of a step",
    "embedding_gradient": "the loss's gradient of each vector",
    "kept_graphs": "what chunks keep for their backward pass",
    "activations": "the chunk in work",
    "loss_workspace": "what the loss takes besides vectors",
    "slack": "what the allocator loses between its blocks",
}
"""What is held, by the names of a prediction's parts."""

_MOMENTS = {
    "embedding": "while texts are embedded",
    "embedding kept": "while texts are embedded",
    "loss": "while the loss is computed",
    "backward": "in the backward pass",
    "backward of kept": "in the backward pass",
}


def plan_tables(plan: RecipePlan) -> list[Table]:
    """What is held at the peak of a step, its cost, and the largest batches."""
    prediction = plan.prediction
    title = f"Predicted peak memory ({plan.device_type}), {_MOMENTS[prediction.moment]}"
    parts = Table(title=title)
    for column in ("part", "GiB", "what it is"):
        parts.add_column(column, justify="right" if column == "GiB" else "left")
    for name, size in prediction.parts.items():
        parts.add_row(name.replace("_", " "), f"{size / GIB:.3f}", _PARTS[name])
    parts.add_row("total", f"{prediction.peak_bytes / GIB:.3f}", "", style="bold")
    parts.add_row("limit", f"{plan.limit_bytes / GIB:.3f}", "what the run may take")
    return [parts, _cost_table(plan), _largest_table(plan)]


def _cost_table(plan: RecipePlan) -> Table:
    prediction, shape = plan.prediction, plan.shape
    cost = Table(title="A step")
    for column in ("what", "how much", "what it is"):
        cost.add_column(column, justify="right" if column == "how much" else "left")
    padding = prediction.padded_tokens / prediction.tokens - 1
    for what, value, meaning in (
        ("logical batch", f"{shape.rows:,} rows", f"{shape.slots:,} texts, one loss over them all"),
        ("tokens", f"{prediction.tokens:,}", "of the texts themselves"),
        ("padding", f"{padding:.1%}", "more, to make a chunk's texts equally long"),
        ("longest text", f"{shape.longest} tokens", "template and special tokens counted"),
        ("arithmetic", f"{prediction.flops / 1e12:,.1f} TFLOP", f"in {plan.dtype}"),
        ("cost", f"{prediction.relative_cost:.2f}", "times plain training on the batch at once"),
    ):
        cost.add_row(what, value, meaning)
    return cost


def _largest_table(plan: RecipePlan) -> Table:
    largest = Table(title="Largest logical batch")
    for column in ("memory", "rows"):
        largest.add_column(column, justify="right" if column == "rows" else "left")
    for limit, rows in plan.max_logical_batch.items():
        largest.add_row(f"{limit / GIB:g} GiB", f"{rows:,}" if rows else "does not fit")
    return largest


def before_after_table(before: Sequence[SetScore], after: Sequence[SetScore]) -> Table:
    """Spearman x 100, a row per set."""
    table = Table(title="Spearman x 100", caption=_SPEARMAN)
    for column in ("set", "pairs", "before", "after", "gain"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for old, new in zip(before, after, strict=True):
        gain = new.spearman - old.spearman
        table.add_row(
            new.name,
            str(new.num_pairs),
            f"{100 * old.spearman:.2f}",
            f"{100 * new.spearman:.2f}",
            f"{100 * gain:+.2f}",
        )
    return table


def _between(low: float, high: float) -> str:
    return f"{100 * low:.2f} to {100 * high:.2f}"


_KINDS = {
    "sha256": "sha256 of the file",
    "revision": "revision on the hub",
    "pairs": "sha256 of the pairs",
}


_SPEARMAN = (
    "Spearman: how far cosines of vectors rank the pairs as people did, 100 being the same order"
)


def _score_notes(scores: Sequence[SetScore], num_resamples: int) -> str:
    """What the numbers are, and which texts are not the protocol's."""
    kinds: dict[str, list[str]] = {}
    for score in scores:
        kinds.setdefault(score.version.partition(":")[0], []).append(score.name)
    notes = [_SPEARMAN, f"95 %: its interval, over {num_resamples:,} resamples of the pairs"]
    notes += [
        f"data: {_KINDS[kind]}" + (f" ({', '.join(names)})" if len(kinds) > 1 else "")
        for kind, names in kinds.items()
    ]
    if not all(score.own_text for score in scores):
        notes.append("*: the original text, where the protocol scores a prepared one")
    return "\n".join(notes)


def score_table(report: StsReport) -> Table:
    """Correlations x 100 with the interval of Spearman's, a row per set, and the mean."""
    table = Table(
        title=f"{report.label}, x 100",
        caption=_score_notes(report.scores, report.num_resamples),
        collapse_padding=True,  # so that the sets of a protocol fit 80 columns
    )
    for column in ("set", "pairs", "Spearman", "95 %", "Pearson", "data"):
        left = column in ("set", "data")  # a file's path is long, and not cut
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for score, interval in zip(report.scores, report.intervals, strict=True):
        table.add_row(
            score.name + ("" if score.own_text else "*"),
            str(score.num_pairs),
            f"{100 * score.spearman:.2f}",
            _between(interval.low, interval.high),
            "" if score.pearson is None else f"{100 * score.pearson:.2f}",
            score.version.partition(":")[2],
        )
    if len(report.sets) > 1:
        of = "" if report.protocol is None else f" of {len(report.protocol.sets)}"
        table.add_row(
            "mean" if report.complete else f"mean of {len(report.sets)}{of}",
            str(sum(score.num_pairs for score in report.scores)),
            f"{100 * report.mean:.2f}",
            _between(report.mean_interval.low, report.mean_interval.high),
            f"{100 * report.mean_pearson:.2f}",
            "",
            style="bold",
        )
    return table


def transfer_table(report: TransferReport) -> Table:
    """Accuracies in percent, a row per task, and the mean."""
    table = Table(title="Transfer tasks, accuracy in %", caption=_transfer_notes(report))
    for column in ("task", "accuracy", "dev", "rows", "sha256 of the file"):
        left = column in ("task", "sha256 of the file")
        table.add_column(column, justify="left" if left else "right")
    mark = "" if report.limit is None else "*"
    for score in report.scores:
        rows = [
            f"{used:,}"
            + ("" if used == score.task_rows[split] else f" of {score.task_rows[split]:,}")
            + ("" if split == "all" else f" {split}")
            for split, used in score.num_rows.items()
        ]
        table.add_row(
            score.name + mark,
            f"{100 * score.accuracy:.2f}",
            f"{100 * score.dev_accuracy:.2f}",
            "\n".join(rows),
            "\n".join(checksum[:DIGITS] for checksum in score.checksums.values()),
        )
    if len(report.scores) > 1:
        of = "" if report.all_tasks else f" of {len(report.scores)} of {report.num_tasks}"
        table.add_row(
            f"mean{of}{mark}",
            f"{100 * report.mean:.2f}",
            f"{100 * report.mean_dev:.2f}",
            "",
            "",
            style="bold",
        )
    return table


def _transfer_notes(report: TransferReport) -> str:
    """Protocols with their tasks, what was embedded, and what departs from the protocol."""
    tasks: dict[str, list[str]] = {}
    for score in report.scores:
        tasks.setdefault(score.protocol, []).append(score.name)
    notes = [f"{', '.join(names)}: {protocol}" for protocol, names in tasks.items()]
    notes.append(f"embeddings: {report.embeddings}")
    if report.cleaned_up:
        notes.append(CLEAN_UP)
    if report.limit is not None:
        notes.append(f"*: {report.limit} rows a split at most; not the protocol's figure")
    return "\n".join(notes)


def report_table(report: StsReport | TransferReport) -> Table:
    """The table of what `eval` scored."""
    return score_table(report) if isinstance(report, StsReport) else transfer_table(report)


def trial_table(trials: Sequence[Trial], rows: int) -> Table:
    """The best trials, and the one without a demonstration wherever it stands."""
    table = Table(title="Spearman x 100, with 95 % intervals")
    for column in ("", "Spearman", "interval", "gain", "interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("demonstration", overflow="fold")
    for place, trial in enumerate(trials, 1):
        plain = trial.sentence is None
        if place > rows and not plain:
            continue
        table.add_row(
            str(place),
            f"{100 * trial.spearman:.2f}",
            f"{100 * trial.low:.2f} to {100 * trial.high:.2f}",
            "" if plain else f"{100 * trial.gain:+.2f}",
            "" if plain else f"{100 * trial.gain_low:+.2f} to {100 * trial.gain_high:+.2f}",
            Text("none" if plain else f"{trial.sentence} -> {trial.word}"),  # brackets and all
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Spearman x 100 of A and B, and B less A with its interval."""
    caption = "an interval with 0 in it shows no difference"
    if comparison.a.float32 != comparison.b.float32:
        exact, other = "AB" if comparison.a.float32 else "BA"
        caption += f"\n{exact} was computed in float32, {other} in its model's own dtype"
    mean = "mean" if comparison.a.complete else f"mean of {len(comparison.sets)}"
    table = Table(title=f"{comparison.a.label}, x 100", caption=caption)
    for column in ("set", "pairs", "A", "B", "B - A", "95 % of B - A"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for entry in (*comparison.sets, comparison.mean):
        if entry is comparison.mean and len(comparison.sets) == 1:
            continue
        table.add_row(
            mean if entry is comparison.mean else entry.name,
            str(entry.num_pairs),
            f"{100 * entry.a:.2f}",
            f"{100 * entry.b:.2f}",
            f"{100 * entry.difference:+.2f}",
            f"{100 * entry.interval.low:+.2f} to {100 * entry.interval.high:+.2f}",
            style="bold" if entry is comparison.mean else None,
        )
    return table
