"""Commands that use a model: eval, compare, embed, icl-search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lowmem_cft.cli.files import check_json_name, check_writable, read_lines, write_vectors
from lowmem_cft.cli.options import Offline, Overrides, go_offline, make_screen, print_table


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
    check_json_name(out)
    go_offline(offline)
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
    check_writable(run / "eval.json" if into_run else out)
    check_writable(mteb_out, "--mteb-out", folder=True)

    def place_of(found: eval_command.Report) -> Optional[Path]:
        return run / found.file_name if into_run else out

    with make_screen() as screen:
        result = eval_command.score_and_write(score, place_of, screen.say)
    print_table(report_table(result))
    if (place := place_of(result)) is not None:
        typer.echo(f"written: {place}")
    if mteb_out is not None and isinstance(result, Report):
        written = task_result.write_task_results(result, mteb_out)
        typer.echo(f"written: {len(written)} files in {mteb_out}")


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
    check_writable(out)
    print_table(comparison_table(found))
    typer.echo(f"A: {found.a.model} ({found.a.path})")
    typer.echo(f"B: {found.b.model} ({found.b.path})")
    if out is not None:
        write_json(out, comparing.as_json(found))
        typer.echo(f"written: {out}")


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
    texts = read_lines(file)
    check_writable(out)
    from lowmem_cft.evaluation.sts.correlation import num_not_finite
    from lowmem_cft.inference.loading import load_model
    from lowmem_cft.machine import choose_device

    with make_screen() as screen:
        loaded = load_model(
            model, choose_device(), screen.say, recipe_name=recipe, overrides=overrides or []
        )
        screen.begin(len(set(texts)), 0, what="texts")
        vectors = loaded.embed(texts, on_progress=screen.advance, say=screen.say)
    if num_bad := num_not_finite(vectors):
        raise ValueError(
            f"{file}: {num_bad} of {len(texts)} embeddings are not finite, so {out} was not "
            "written; use a wider model.dtype"
        )
    write_vectors(out, texts, vectors)
    typer.echo(f"{out}: {vectors.shape[0]} vectors of {vectors.shape[1]} numbers")


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
    go_offline(offline)
    from lowmem_cft.evaluation.search import search as icl
    from lowmem_cft.evaluation.search.demonstrations import SHIPPED, read_demonstrations
    from lowmem_cft.evaluation.search.trials import top_table
    from lowmem_cft.evaluation.sts.sets import data_folder, load_set
    from lowmem_cft.machine import choose_device

    found = read_demonstrations(demonstrations or SHIPPED)
    scored_set = load_set(set_name, data_folder(), limit, offline=offline, cleaned_up=clean_up)
    folder = out or Path("icl") / Path(model).name
    check_writable(folder, folder=True)
    with make_screen() as screen:
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
    print_table(top_table(trials, top))
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
