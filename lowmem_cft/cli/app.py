"""The command line. Nothing heavy is imported until a command needs it.

Exit codes: 0 done, 2 the user's mistake, 1 anything else. Messages go to standard error, results
to standard output. `--debug` shows the traceback behind a message.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from lowmem_cft import __version__

app = typer.Typer(
    name="lowmem-cft",
    help="Fine-tune decoder language models into sentence-embedding models on one small GPU.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

_state = {"debug": False}

# typer reads annotations at run time, where Python 3.10's dialect must do.
Overrides = Annotated[
    Optional[list[str]],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe value: train.learning_rate=1e-4."
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Do not look for anything on the hub.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    _state["debug"] = debug


def _screen() -> Any:
    from rich.console import Console

    from lowmem_cft.cli.progress import Screen
    from lowmem_cft.model.backbone import quiet_libraries

    quiet_libraries()
    return Screen(Console(stderr=True))


def _go_offline(offline: bool) -> None:
    if offline:
        import os

        # Read by huggingface_hub and datasets when they are first imported.
        os.environ["HF_HUB_OFFLINE"] = "1"


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a preset.")],
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run.")] = False,
    offline: Offline = False,
) -> None:
    """Fine-tune a model, evaluate it before and after, export it."""
    from lowmem_cft.recipe.load import load_recipe, to_yaml

    resolved = load_recipe(recipe, overrides or [])
    if print_config:
        typer.echo(to_yaml(resolved), nl=False)
        return
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: choose one")
    _go_offline(offline)
    from lowmem_cft.cli.tables import before_after_table
    from lowmem_cft.evaluation.sts.score import SetScore
    from lowmem_cft.training.pipeline import run_recipe

    with _screen() as screen:
        folder, metrics = run_recipe(
            resolved, screen, resume=resume, overwrite=overwrite, offline=offline
        )
    before = [SetScore(**score) for score in metrics["before"]]
    after = [SetScore(**score) for score in metrics["after"]]
    _print(before_after_table(before, after))
    typer.echo(f"run: {folder.path}")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a preset.")],
    memory: Annotated[
        Optional[str],
        typer.Option(
            help="Limit of it all, such as 12GiB; a graphics card's unless --device says."
        ),
    ] = None,
    device: Annotated[
        Optional[str], typer.Option(help="cuda or cpu; need not be on this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    overrides: Overrides = None,
) -> None:
    """Predict memory and cost of a recipe's steps, from the model's configuration alone."""
    from lowmem_cft.recipe.load import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device: got {device}, wanted cuda or cpu")
    from lowmem_cft.cli.tables import plan_tables
    from lowmem_cft.planning.limits import plan_limit
    from lowmem_cft.planning.recipe_plan import plan_recipe

    with _screen() as screen:
        device_type, limit = plan_limit(resolved, memory, device)
        found = plan_recipe(resolved, device_type, limit)
        for note in found.notes:
            screen.say(note)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    for table in plan_tables(found):
        _print(table)
    typer.echo(found.prediction.plan.describe())


@app.command()
def demo(overrides: Overrides = None, offline: Offline = False) -> None:
    """Train the embedded small model on the data at hand; ends in one line of JSON."""
    _go_offline(offline)
    from lowmem_cft.cli.tables import before_after_table
    from lowmem_cft.training.demo import run_demo

    with _screen() as screen:
        before, after, summary = run_demo(screen, offline=offline, overrides=overrides or [])
    _print(before_after_table(before, after))
    typer.echo(json.dumps(summary))


@app.command("eval")
def evaluate_model(
    model: Annotated[
        str,
        typer.Argument(
            help="Run folder, exported model, sentence-transformers folder, or base model."
        ),
    ],
    suite: Annotated[
        Optional[str],
        typer.Option(help="sts: all sets of a protocol, none left out. transfer: seven tasks."),
    ] = None,
    protocol: Annotated[
        Optional[str],
        typer.Option(help="mteb (nine sets; --suite sts takes it) or senteval (seven sets)."),
    ] = None,
    names: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set-name",
            "-s",
            help="STS set, file of pairs or saved data set; a transfer task with --suite transfer.",
        ),
    ] = None,
    clean_up: Annotated[
        bool, typer.Option("--clean-up", help="PromptEOL's text clean-up, for its templates.")
    ] = False,
    out: Annotated[
        Optional[Path],
        typer.Option(help="Write the scores as JSON here; a run's folder is the default."),
    ] = None,
    mteb_out: Annotated[
        Optional[Path], typer.Option(help="Write mteb's TaskResult JSON into this folder.")
    ] = None,
    float32: Annotated[
        bool,
        typer.Option("--float32", help="Compute in float32: slower, and the same in any batch."),
    ] = False,
    resamples: Annotated[
        Optional[int],
        typer.Option(min=1, help="Bootstrap resamples of STS pairs; 1000 if absent."),
    ] = None,
    limit: Annotated[
        Optional[int],
        typer.Option(min=1, help="Transfer: rows of a split at most; not the protocol's then."),
    ] = None,
    solver: Annotated[
        Optional[str],
        typer.Option(help="Transfer: senteval (Adam, stopped early; the default) or converged."),
    ] = None,
    recipe: Annotated[
        Optional[str], typer.Option(help="For a base model: the recipe that says how to embed.")
    ] = None,
    overrides: Overrides = None,
    offline: Offline = False,
) -> None:
    """Score a model on STS sets, with intervals, or on transfer tasks."""
    _check_json_name(out)
    _go_offline(offline)
    from lowmem_cft.cli.tables import report_table
    from lowmem_cft.evaluation import suites as eval_command
    from lowmem_cft.evaluation.sts import mteb_results as task_result
    from lowmem_cft.evaluation.sts.report import Report

    options = eval_command.Options(
        model,
        suite,
        protocol,
        names or [],
        clean_up=clean_up,
        mteb_out=mteb_out,
        float32=float32,
        resamples=resamples,
        limit=limit,
        solver=solver,
        recipe=recipe,
        overrides=overrides or [],
        offline=offline,
    )
    score = eval_command.prepare(options)
    run = Path(model).expanduser()
    into_run = out is None and (run / "recipe.yaml").is_file()
    _check_writable(run / "eval.json" if into_run else out)
    _check_writable(mteb_out, "--mteb-out", folder=True)

    def place_of(found: eval_command.Report) -> Optional[Path]:
        return run / found.file_name if into_run else out

    with _screen() as screen:
        result = eval_command.score_and_write(score, place_of, screen.say)
    _print(report_table(result))
    if (place := place_of(result)) is not None:
        typer.echo(f"written: {place}")
    if mteb_out is not None and isinstance(result, Report):
        written = task_result.write_task_results(result, mteb_out)
        typer.echo(f"written: {len(written)} files in {mteb_out}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Run folder, or a file of eval.")],
    b: Annotated[Path, typer.Argument(metavar="RUN_B", help="What to compare with it.")],
    out: Annotated[Optional[Path], typer.Option(help="Write the comparison as JSON here.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples.")] = 1000,
) -> None:
    """Compare two evaluated models: the paired difference of their scores, with its interval."""
    from lowmem_cft.cli.tables import comparison_table
    from lowmem_cft.evaluation.sts import compare as comparing
    from lowmem_cft.files import write_json

    found = comparing.compare(a, b, resamples)
    _check_writable(out)
    _print(comparison_table(found))
    typer.echo(f"A: {found.a.model} ({found.a.path})")
    typer.echo(f"B: {found.b.model} ({found.b.path})")
    if out is not None:
        write_json(out, comparing.as_json(found))
        typer.echo(f"written: {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder to write; RUN/model if absent.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge the adapter into 16-bit weights.")
    ] = False,
) -> None:
    """Write a finished run as a folder that SentenceTransformer(path) loads, and check it."""
    from lowmem_cft.export.check import checked
    from lowmem_cft.export.layout import export_model
    from lowmem_cft.inference.loading import RECORD, load_model
    from lowmem_cft.machine import choose_device

    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is no run folder (no recipe.yaml in it)")
    target = out or run / "model"
    ours = not target.exists() or (target / RECORD).is_file()
    if not ours and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--out: {target} exists and is no export of ours; choose another folder")
    _check_writable(target, folder=True)
    with _screen() as screen:
        loaded = load_model(str(run), choose_device(), screen.say)
        kind: Any = "merged" if merged else "adapter"
        export_model(loaded.encoder, loaded.backbone, loaded.recipe, target, kind)
        card = run / "README.md"
        if card.is_file():
            text = card.read_text(encoding="utf-8").replace(str(run / "model"), str(target))
            (target / "README.md").write_text(text, encoding="utf-8")
        checked(target, kind, loaded.encoder, loaded.tokenizer, loaded.recipe, screen)
    typer.echo(str(target))


@app.command()
def embed(
    model: Annotated[str, typer.Argument(help="Run folder, exported model, or base model.")],
    file: Annotated[Path, typer.Argument(help="Text file, one text a line.")],
    out: Annotated[
        Optional[Path], typer.Option(help=".npy or .parquet; FILE.npy if absent.")
    ] = None,
    recipe: Annotated[
        Optional[str], typer.Option(help="For a base model: the recipe that says how to embed.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write one vector per line of a file, in its order."""
    out = out or file.with_suffix(file.suffix + ".npy")
    if out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--out: got {out.name}, wanted a name that ends in .npy or .parquet")
    texts = _read_lines(file)
    _check_writable(out)
    from lowmem_cft.evaluation.sts.correlation import num_not_finite
    from lowmem_cft.inference.embed import embed_texts
    from lowmem_cft.inference.loading import load_model
    from lowmem_cft.machine import choose_device

    with _screen() as screen:
        loaded = load_model(
            model, choose_device(), screen.say, recipe_name=recipe, overrides=overrides or []
        )
        screen.begin(len(set(texts)), 0, what="texts")
        vectors = embed_texts(
            loaded.encoder,
            loaded.tokenizer,
            texts,
            loaded.text_format,
            token_budget=loaded.recipe.eval.token_budget,
            on_progress=screen.advance,
            say=screen.say,
        )
    if num_bad := num_not_finite(vectors):
        raise ValueError(
            f"{file}: {num_bad} of {len(texts)} embeddings are not finite, so {out} was not "
            "written; use a wider model.dtype"
        )
    _write_vectors(out, texts, vectors)
    typer.echo(f"{out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing, and how to get it."""
    from rich.table import Table

    from lowmem_cft.cli.doctor import examine
    from lowmem_cft.model.backbone import quiet_libraries

    quiet_libraries()
    table = Table(title=f"lowmem-cft {__version__}")
    for column in ("", "what", "found", "remedy"):
        table.add_column(column, overflow="fold")
    findings = examine()
    for finding in findings:
        table.add_row(finding.level, finding.what, finding.found, finding.remedy)
    _print(table)
    if any(finding.level == "missing" for finding in findings):
        raise typer.Exit(1)


@app.command()
def recipes() -> None:
    """List the recipes shipped with the package."""
    from lowmem_cft.recipe.load import preset_names

    for name in preset_names():
        typer.echo(name)


@app.command("icl-search")
def icl_search(
    model: Annotated[str, typer.Argument(help="Run folder, exported model, or base model.")],
    demonstrations: Annotated[
        Optional[Path],
        typer.Option(help="File with columns sentence and word; the 72 shipped if absent."),
    ] = None,
    template: Annotated[
        Optional[str],
        typer.Option(help="Put demonstrations before this; the model's own, else PromptEOL's."),
    ] = None,
    set_name: Annotated[
        str,
        typer.Option("--set-name", "-s", help="STS set, file of pairs, or demo (embedded pairs)."),
    ] = "STSBenchmark-dev",
    limit: Annotated[
        Optional[int], typer.Option(min=2, help="Score on this many of its pairs, drawn once.")
    ] = None,
    clean_up: Annotated[
        bool, typer.Option("--clean-up", help="PromptEOL's text clean-up.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="How many to list.")] = 10,
    out: Annotated[
        Optional[Path], typer.Option(help="Folder of the scores; icl/MODEL if absent.")
    ] = None,
    recipe: Annotated[
        Optional[str], typer.Option(help="For a base model: the recipe that says how to embed.")
    ] = None,
    overrides: Overrides = None,
    offline: Offline = False,
) -> None:
    """Find the demonstration that helps most; the same command goes on where one was stopped."""
    _go_offline(offline)
    from lowmem_cft.evaluation.search import search as icl
    from lowmem_cft.evaluation.search.demonstrations import SHIPPED, read_demonstrations
    from lowmem_cft.evaluation.search.trials import top_table
    from lowmem_cft.evaluation.sts.sets import data_folder, load_set
    from lowmem_cft.machine import choose_device

    found = read_demonstrations(demonstrations or SHIPPED)
    scored_set = load_set(set_name, data_folder(), limit, offline=offline, cleaned_up=clean_up)
    folder = out or Path("icl") / Path(model).name
    _check_writable(folder, folder=True)
    with _screen() as screen:
        searched = icl.load_searched(
            model,
            template,
            choose_device(),
            screen.say,
            recipe_name=recipe,
            overrides=overrides or [],
        )
        screen.say(f"template: {searched.template}")
        trials = icl.search(
            searched.embed_under(screen.say),
            scored_set,
            searched.template,
            found,
            folder,
            searched.identity() | icl.set_identity(scored_set),
            screen,
        )
    _print(top_table(trials, top))
    best = trials[0]
    if best.sentence is None:
        typer.echo("No demonstration beats the template alone.")
    else:
        typer.echo(
            f"The best of {len(found)} on the pairs it was chosen by: luck is in its gain, "
            "so report other sets."
        )
    template = best.template(searched.template)
    typer.echo(searched.advice(template))
    typer.echo(searched.as_recipe(template), nl=False)


@app.command()
def reproduce(
    paper: Annotated[str, typer.Argument(help="cft (arXiv 2408.00690) or prompteol (2307.16645).")],
    model: Annotated[str, typer.Option(help="minicpm-2b, opt-1.3b, ...; a wrong one lists them.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder of it all; reproductions/PAPER-MODEL if absent.")
    ] = None,
    hours: Annotated[
        Optional[float],
        typer.Option(
            help="Fit it all into about so many hours here: fewer steps, less data to score."
        ),
    ] = None,
    budget: Annotated[
        Optional[str],
        typer.Option(
            help="Memory, such as 12GiB. Changes time only, and what --hours has room for."
        ),
    ] = None,
    stages: Annotated[
        Optional[list[str]],
        typer.Option(
            "--stage",
            help="Do only these; of cft also icl-search, transfer-base and transfer-trained.",
        ),
    ] = None,
    redo: Annotated[
        Optional[list[str]],
        typer.Option(help="Do this stage from its beginning, once; the others stay."),
    ] = None,
    transfer_rows: Annotated[
        Optional[int], typer.Option(min=20, help="Cut transfer tasks to so many rows a split.")
    ] = None,
    icl_pairs: Annotated[
        Optional[int], typer.Option(min=2, help="Choose demonstrations by so many pairs.")
    ] = None,
    demonstrations: Annotated[
        Optional[Path], typer.Option(help="File with columns sentence and word.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show stages, FLOPs, time and memory, and stop.")
    ] = False,
    overrides: Overrides = None,
    offline: Offline = False,
) -> None:
    """Run a paper stage by stage and report beside its figures; the same command goes on."""
    _go_offline(offline)
    from lowmem_cft.cli.tables import stage_table
    from lowmem_cft.papers.reproduction import Reproduction
    from lowmem_cft.papers.request import Request

    request = Request(
        paper,
        model,
        hours,
        budget,
        tuple(overrides or ()),
        transfer_rows,
        icl_pairs,
        None if demonstrations is None else str(demonstrations),
    )
    folder = out or Path("reproductions") / f"{paper}-{model}"
    with _screen() as screen:
        asked = Reproduction(request, folder, stages, offline=offline)
        screen.say(asked.share.describe())
        for departure in asked.departures():
            screen.say(f"not as published: {departure}")
        if dry_run and (missing := asked.missing_data()) is not None:
            screen.say(f"missing: {missing}")
        if not dry_run:
            _check_writable(folder, folder=True)
            report = asked.run(screen, redo=redo or [])
    if dry_run:
        _print(stage_table(asked.estimates()))
        return
    for file in report:
        typer.echo(f"written: {file}")


def _read_lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"no such file: {file}")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}; convert it first") from error
    # not splitlines: it also cuts at separators that may stand inside a text
    texts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not text.strip():
        raise ValueError(f"{file}: no lines, so nothing to embed")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise ValueError(f"{file}, line {number}: empty; remove it or put a text there")
    return texts


def _write_vectors(out: Path, texts: list[str], vectors: Any) -> None:
    partial = out.with_name(out.name + ".partial")
    if out.suffix == ".npy":
        import numpy as np

        with partial.open("wb") as stream:
            np.save(stream, vectors)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        pq.write_table(pa.table({"text": texts, "embedding": column}), partial)
    partial.replace(out)


def _check_json_name(out: Path | None) -> None:
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out: got {out.name}, wanted a name that ends in .json")


def _check_writable(out: Path | None, option: str = "--out", *, folder: bool = False) -> None:
    """Refuse a bad place of a file, or of a folder, before the work is done, not after."""
    if out is None:
        return
    if out.exists() and out.is_dir() != folder:
        got, wanted = ("file", "folder") if folder else ("folder", "file")
        raise ValueError(f"{option}: {out} is a {got}, wanted a {wanted}; choose another place")
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    import os

    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{option}: cannot write to {parent}; choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)


def _report(error: BaseException, code: int) -> int:
    if _state["debug"]:
        raise error
    text = str(error).strip() or type(error).__name__
    known = isinstance(error, (ValueError, RuntimeError, OSError))
    prefix = "error" if known else f"unexpected {type(error).__name__}"
    suffix = "" if known else " (run again with --debug before the command for the traceback)"
    print(f"lowmem-cft: {prefix}: {text}{suffix}", file=sys.stderr)
    return code


def _exit_code(command: Callable[[], object]) -> int:
    try:
        command()
    except ValueError as error:
        return _report(error, 2)
    except KeyboardInterrupt:
        print("lowmem-cft: stopped", file=sys.stderr)
        return 1
    except Exception as error:  # the outermost door: a message, or all of it with --debug
        return _report(error, 1)
    return 0


def main() -> None:
    """Entry point of the `lowmem-cft` command."""
    sys.exit(_exit_code(app))
