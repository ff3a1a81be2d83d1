"""Commands that use a model: eval, compare, embed, icl-search."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lowmem_cft.cli.columns import with_columns_named
from lowmem_cft.cli.files import (
    STANDARD_INPUT,
    check_json_name,
    check_writable,
    read_lines,
    write_vectors,
)
from lowmem_cft.cli.options import Offline, Overrides, go_offline, make_screen, print_table
from lowmem_cft.evaluation.sts.protocols import protocol_named
from lowmem_cft.evaluation.sts.sets import check_set_name
from lowmem_cft.model.names import check_model_name

if TYPE_CHECKING:
    from lowmem_cft.evaluation.suites import Report

# typer reads annotations at run time, where Python 3.10's dialect must do.
AnyModel = Annotated[
    str,
    typer.Argument(
        help="Run folder, exported model, sentence-transformers model (folder or hub id), or base "
        "model."
    ),
]
Model = Annotated[str, typer.Argument(help="Run folder, exported model, or base model.")]
Recipe = Annotated[
    Optional[str], typer.Option(help="For a base model: the recipe that says how to embed.")
]
Role = Annotated[
    Optional[str],
    typer.Option(
        "--as",
        help="query or document: what the texts are, for a model that embeds the two differently. "
        "If absent, what sentence-transformers' encode does; of a model trained here, query.",
    ),
]
Suite = Annotated[
    Optional[str],
    typer.Option(help="sts: all sets of a protocol, none left out. transfer: seven tasks."),
]
Protocol = Annotated[
    Optional[str],
    typer.Option(help="mteb (nine sets; --suite sts takes it) or senteval (seven sets)."),
]
Names = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set-name",
        "-s",
        help="STS set, file of pairs (FILE::first,second,score names its columns) or saved data "
        "set; a transfer task with --suite transfer.",
    ),
]
CleanUp = Annotated[
    bool, typer.Option("--clean-up", help="PromptEOL's text clean-up, for its templates.")
]
ScoresFile = Annotated[
    Optional[Path],
    typer.Option(help="Write the scores as JSON here; a run's folder is the default."),
]
MtebFolder = Annotated[
    Optional[Path], typer.Option(help="Write mteb's TaskResult JSON into this folder.")
]
Float32 = Annotated[
    bool,
    typer.Option("--float32", help="Compute in float32: slower, and the same in any batch."),
]
Resamples = Annotated[
    Optional[int],
    typer.Option(min=1, help="Bootstrap resamples of STS pairs; 1000 if absent."),
]
RowLimit = Annotated[
    Optional[int],
    typer.Option(min=1, help="Transfer: rows of a split at most; not the protocol's then."),
]
Solver = Annotated[
    Optional[str],
    typer.Option(help="Transfer: senteval (Adam, stopped early; the default) or converged."),
]
Demonstrations = Annotated[
    Optional[Path],
    typer.Option(help="File with columns sentence and word; the 72 shipped if absent."),
]
Template = Annotated[
    Optional[str],
    typer.Option(help="Put demonstrations before this; the model's own, else PromptEOL's."),
]
SetName = Annotated[
    str,
    typer.Option("--set-name", "-s", help="STS set, file of pairs, or demo (embedded pairs)."),
]
PairLimit = Annotated[
    Optional[int], typer.Option(min=2, help="Score on this many of its pairs, drawn once.")
]
TrialsFolder = Annotated[
    Optional[Path], typer.Option(help="Folder of the scores; icl/MODEL if absent.")
]


def evaluate_model(
    model: AnyModel,
    suite: Suite = None,
    protocol: Protocol = None,
    names: Names = None,
    clean_up: CleanUp = False,
    out: ScoresFile = None,
    mteb_out: MtebFolder = None,
    float32: Float32 = False,
    resamples: Resamples = None,
    limit: RowLimit = None,
    solver: Solver = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
    offline: Offline = False,
) -> None:
    """Score a model on STS sets, with intervals, or on transfer tasks."""
    check_json_name(out)
    check_model_name(model)
    if suite != "transfer":
        for name in names or []:
            check_set_name(name, None if protocol is None else protocol_named(protocol))
        names = with_columns_named(names or [], lambda _, named: f"-s {shlex.quote(named)}")
    go_offline(offline)
    from lowmem_cft.cli.tables import report_table
    from lowmem_cft.evaluation.suites import read_suite
    from lowmem_cft.inference.embedder import load_embedder
    from lowmem_cft.machine import choose_device

    loaded_suite = read_suite(
        suite,
        names or [],
        clean_up=clean_up,
        protocol=protocol,
        resamples=resamples,
        mteb_out=mteb_out,
        limit=limit,
        solver=solver,
        offline=offline,
    )
    run = Path(model).expanduser()
    into_run = out is None and (run / "recipe.yaml").is_file()
    check_writable(run / "eval.json" if into_run else out)
    check_writable(mteb_out, "--mteb-out", folder=True)

    def place_of(report: Report) -> Optional[Path]:
        return run / report.file_name if into_run else out

    with make_screen() as screen:
        embedder = load_embedder(
            model,
            choose_device(),
            screen.say,
            recipe_name=recipe,
            overrides=overrides or [],
            float32=float32,
            normalize=loaded_suite.normalize,
        )
        reports = loaded_suite.score(embedder, model, screen.say)
        report = _write_each(reports, place_of, screen.say)
    print_table(report_table(report))
    if (place := place_of(report)) is not None:
        typer.echo(f"written: {place}")
    if mteb_out is not None:
        _write_mteb(report, mteb_out)


def _write_mteb(report: Report, folder: Path) -> None:
    from lowmem_cft.evaluation.sts.mteb_results import write_task_results
    from lowmem_cft.evaluation.sts.report import StsReport

    assert isinstance(report, StsReport), "checked when the suite was read"
    files = write_task_results(report, folder)
    typer.echo(f"written: {len(files)} files in {folder}")


def _write_each(
    reports: Iterator[Report],
    place_of: Callable[[Report], Optional[Path]],
    say: Callable[[str], None],
) -> Report:
    """The last report, which is whole, written where `place_of` says, if it says anything.

    Until it is there, the report so far lies in a file of its own beside that place, so that what
    stops early loses one set at most.
    """
    unfinished: Optional[Path] = None
    try:
        for report in reports:
            if (place := place_of(report)) is not None:
                target = place.with_name(f"unfinished-{place.name}")
                report.write(target)
                if unfinished != target:
                    _remove(unfinished)
                unfinished = target
        if place is not None:
            report.write(place)
    except BaseException:  # Ctrl-C too
        if unfinished is not None:
            say(f"what was scored before it stopped is in {unfinished}")
        raise
    _remove(unfinished)
    return report


def _remove(report: Optional[Path]) -> None:
    from lowmem_cft.evaluation.sts.report import pairs_file

    if report is not None:
        report.unlink(missing_ok=True)
        pairs_file(report).unlink(missing_ok=True)  # a report of transfer tasks has none


def compare(
    a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Run folder, or a file of eval.")],
    b: Annotated[Path, typer.Argument(metavar="RUN_B", help="What to compare with it.")],
    out: Annotated[Optional[Path], typer.Option(help="Write the comparison as JSON here.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")] = 1000,
) -> None:
    """Compare two evaluated models: the paired difference of their scores, with its interval."""
    from lowmem_cft.cli.tables import comparison_table
    from lowmem_cft.evaluation.sts import compare as comparing

    comparison = comparing.compare(a, b, resamples)
    check_writable(out)
    print_table(comparison_table(comparison))
    typer.echo(f"A: {comparison.a.model} ({comparison.a.path})")
    typer.echo(f"B: {comparison.b.model} ({comparison.b.path})")
    if out is not None:
        comparison.write(out)
        typer.echo(f"written: {out}")


def embed(
    model: AnyModel,
    file: Annotated[Path, typer.Argument(help="Text file, one text a line; - for standard input.")],
    out: Annotated[
        Optional[Path], typer.Option(help=".npy or .parquet; FILE.npy if absent.")
    ] = None,
    keep_blank: Annotated[
        bool, typer.Option("--keep-blank", help="Embed blank lines too, in place of refusing.")
    ] = False,
    role: Role = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
) -> None:
    """Write one vector per line of a file, in its order."""
    if out is None and file == STANDARD_INPUT:
        raise ValueError("--out: wanted a file for the vectors, since the texts come from no file")
    out = out or file.with_suffix(file.suffix + ".npy")
    if out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--out: got {out.name}, wanted a name that ends in .npy or .parquet")
    check_model_name(model)
    texts = read_lines(file, keep_blank=keep_blank)
    check_writable(out)
    from lowmem_cft.evaluation.sts.correlation import num_not_finite
    from lowmem_cft.inference.embed import role_named
    from lowmem_cft.inference.embedder import load_embedder
    from lowmem_cft.machine import choose_device

    known_role = role_named(role)
    with make_screen() as screen:
        loaded = load_embedder(
            model, choose_device(), screen.say, recipe_name=recipe, overrides=overrides or []
        )
        screen.begin(len(set(texts)), 0, what="texts")
        vectors = loaded.embed(texts, role=known_role, on_progress=screen.advance, say=screen.say)
    if num_bad := num_not_finite(vectors):
        raise ValueError(
            f"{file}: {num_bad} of {len(texts)} embeddings are not finite, so {out} was not "
            "written; use a wider model.dtype"
        )
    write_vectors(out, texts, vectors)
    typer.echo(f"{out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")


def icl_search(
    model: Model,
    demonstrations: Demonstrations = None,
    template: Template = None,
    set_name: SetName = "STSBenchmark-dev",
    limit: PairLimit = None,
    clean_up: Annotated[
        bool, typer.Option("--clean-up", help="PromptEOL's text clean-up.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="How many to list.")] = 10,
    out: TrialsFolder = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
    offline: Offline = False,
) -> None:
    """Find the demonstration that helps most; the same command goes on where one was stopped."""
    check_model_name(model)
    check_set_name(set_name)
    (set_name,) = with_columns_named([set_name], lambda _, named: f"-s {shlex.quote(named)}")
    go_offline(offline)
    from lowmem_cft.cli.tables import trial_table
    from lowmem_cft.evaluation.search.demonstrations import SHIPPED, read_demonstrations
    from lowmem_cft.evaluation.search.search import load_searched
    from lowmem_cft.evaluation.sts.sets import data_folder, load_set
    from lowmem_cft.machine import choose_device

    listed = read_demonstrations(demonstrations or SHIPPED)
    scored_set = load_set(set_name, data_folder(), limit, offline=offline, cleaned_up=clean_up)
    folder = out or Path("icl") / Path(model).name
    check_writable(folder, folder=True)
    with make_screen() as screen:
        searched = load_searched(
            model,
            template,
            choose_device(),
            screen.say,
            recipe_name=recipe,
            overrides=overrides or [],
        )
        screen.say(f"template: {searched.template}")
        result = searched.search(scored_set, listed, folder, screen)
    print_table(trial_table(result.trials, top))
    if result.best.sentence is None:
        typer.echo("No demonstration beats the template alone.")
    else:
        typer.echo(
            f"The best of {len(listed)} on the pairs it was chosen by: luck is in its gain, "
            "so report other sets."
        )
    typer.echo(searched.advice(result.template))
    typer.echo(result.recipe, nl=False)
