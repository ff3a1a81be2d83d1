"""The front door: what `import lowmem_cft` offers, and that it is cheap to open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lowmem_cft as lc
from lowmem_cft.evaluation.search.search import SearchResult
from lowmem_cft.evaluation.sts.report import StsReport
from lowmem_cft.training.interrupt import Interrupted
from running import MakeRecipe, Silent, sentences

NAMES = {
    "Embedder",
    "Embeds",
    "Recipe",
    "Run",
    "TrainRow",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "load",
    "load_recipe",
    "open_run",
    "plan",
    "search_demonstrations",
    "train",
}


def test_the_names_are_these() -> None:
    """A name that goes, or one more, is a decision and not an accident."""
    assert set(lc.__all__) == NAMES == set(dir(lc))
    for name in NAMES:
        assert getattr(lc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fine_tune'"):
        lc.fine_tune  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "pydantic", "numpy", "peft", "yaml", "typer")
    code = f"import sys, lowmem_cft; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_package_takes_a_functions_name() -> None:
    """`lc.export` is the function whatever has been imported before it."""
    code = (
        "import pkgutil, lowmem_cft as lc;"
        "print([m.name for m in pkgutil.iter_modules(lc.__path__) if m.name in lc.__all__])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_from_recipe_to_vectors(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = lc.train(make_recipe(train={"steps": 2}))
    assert run.folder == tmp_path / "runs" / "tiny"
    assert run.metrics.steps == 2
    assert run.model_path == run.folder / "model"
    assert lc.open_run(run.folder) == run
    model = lc.load(run.folder)
    assert isinstance(model, lc.Embedder)
    texts = ["the cat sat", "a dog ran", "the cat sat"]
    vectors = model.embed(texts)
    assert (vectors.dtype, vectors.shape[0]) == (np.float32, 3)
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1])
    np.testing.assert_allclose(lc.load(run.model_path).embed(texts), vectors, atol=1e-5)
    report = lc.evaluate(model, sets=make_recipe().eval.sets)
    assert isinstance(report, StsReport)
    by_name = lc.evaluate(run.folder, sets=make_recipe().eval.sets)
    assert isinstance(by_name, StsReport)
    assert report.sets[0].score == by_name.sets[0].score
    in_float32 = lc.evaluate(lc.load(run.folder, float32=True), sets=make_recipe().eval.sets)
    assert isinstance(in_float32, StsReport)
    assert (report.float32, in_float32.float32) == (False, True)
    for given in ({"float32": True}, {"recipe": "demo"}, {"overrides": ["text.max_tokens=3"]}):
        with pytest.raises(ValueError, match=r"give them to load\(\)"):
            lc.evaluate(model, sets=make_recipe().eval.sets, **given)
    assert report.sets[0].score.spearman == pytest.approx(run.metrics.after[0].spearman, abs=1e-6)


def test_progress_is_told_and_a_stopped_run_goes_on(make_recipe: MakeRecipe) -> None:
    def stop(line: object) -> None:
        raise KeyboardInterrupt

    heard = Silent()
    lc.train(make_recipe(train={"steps": 1, "save_every": 1}), progress=heard)
    assert [line.step for line in heard.lines] == [1]
    with pytest.raises(ValueError, match="exists"):
        lc.train(make_recipe(train={"steps": 1, "save_every": 1}))
    with pytest.raises(Interrupted, match="no step was saved yet"):
        lc.train(
            make_recipe(train={"steps": 3, "save_every": 1}), progress=Silent(stop), overwrite=True
        )
    with pytest.raises(ValueError, match="no checkpoint"):
        lc.train(make_recipe(train={"steps": 3, "save_every": 1}), resume=True)


def test_rows_in_memory(make_recipe: MakeRecipe) -> None:
    """They train as the same rows from a file do, and the run's recipe tells them by checksum."""
    columns = (sentences(seed, 40) for seed in (1, 2, 3))
    rows = [lc.TrainRow(a, p, (n,)) for a, p, n in zip(*columns, strict=True)]
    of_file = lc.train(make_recipe(train={"steps": 3}))
    named = {"name": "memory"}
    recipe = make_recipe(train={"steps": 3}, output={**make_recipe().output.model_dump(), **named})
    run = lc.train(recipe, rows=rows)
    assert run.metrics.after[0].spearman == of_file.metrics.after[0].spearman
    again = lc.load_recipe(str(run.folder / "recipe.yaml"))
    assert again.data.sources[0].path.startswith("memory:")
    with pytest.raises(ValueError, match="given in memory; give them again"):
        lc.train(again, overwrite=True)
    with pytest.raises(ValueError, match=r"data\.sources\.0\.path was"):
        lc.train(recipe, rows=rows[1:], resume=True)
    assert lc.train(recipe, rows=rows, resume=True).metrics.steps == 3
    for wrong, got in (([], "none"), ([("a", "b")], "tuple")):
        with pytest.raises(ValueError, match=f"rows: got {got}, wanted a list"):
            lc.train(recipe, rows=wrong, overwrite=True)  # type: ignore[arg-type]


def test_reports_are_written_and_compared(tiny_folder: Path, tmp_path: Path) -> None:
    def report(pooling: str) -> Path:
        values = ["model.dtype=fp32", f"embedding.pooling={pooling}"]
        path = tmp_path / f"{pooling}.json"
        lc.evaluate(tiny_folder, sets=["demo"], resamples=9, overrides=values).write(path)
        return path

    a, b = report("mean"), report("last")
    comparison = lc.compare(a, b, resamples=20)
    assert comparison.num_resamples == 20
    assert comparison.mean.difference == comparison.mean.b - comparison.mean.a != 0
    comparison.write(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["mean"]["a"] == comparison.mean.a
    assert lc.compare(str(b), str(a)).mean.difference == -comparison.mean.difference
    with pytest.raises(ValueError, match="no such run folder or report"):
        lc.compare(a, tmp_path / "gone.json")


def test_a_search_goes_on_where_it_was_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.tsv"
    own.write_text("sentence\tword\nthe cat sat .\tcat\na dog ran\train\n")
    heard: list[str] = []

    def search(limit: int) -> SearchResult:
        return lc.search_demonstrations(
            tiny_folder,
            demonstrations=own,
            template='the sun is "{text}" not "',
            set_name="demo",
            limit=limit,
            out=tmp_path / "icl",
            overrides=["model.dtype=fp32"],
            progress=heard.append,
        )

    result = search(30)
    assert [trial.spearman for trial in result.trials] == sorted(
        (trial.spearman for trial in result.trials), reverse=True
    )
    assert len(result.trials) == 3
    assert result.best is result.trials[0]
    assert result.template in result.recipe
    assert result.template.endswith('the sun is "{text}" not "')
    assert any(line.startswith("3/3  ") for line in heard)
    assert search(30).trials == result.trials
    assert any("3 of 3 are in" in line for line in heard)
    with pytest.raises(ValueError, match="is of another search: pairs was 30 and is now 29"):
        search(29)


def test_a_plan_needs_neither_weights_nor_a_card(make_recipe: MakeRecipe) -> None:
    plan = lc.plan(make_recipe(), memory="2GiB")
    assert (plan.device_type, plan.limit_bytes) == ("cuda", 2**31)
    assert plan.prediction.peak_bytes <= plan.limit_bytes
    with pytest.raises(ValueError, match="much"):
        lc.plan(make_recipe(), memory="much")


def test_exports(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = lc.train(
        make_recipe(
            train={"steps": 1},
            output={"export": "none", "name": "tiny", "folder": str(tmp_path / "runs")},
        )
    )
    assert run.model_path is None
    heard: list[str] = []
    merged = lc.export(run, tmp_path / "merged", kind="merged", progress=heard.append)
    assert merged == tmp_path / "merged"
    assert any("export checked" in text for text in heard)
    assert lc.export(run.folder) == run.folder / "model" == run.model_path
    vectors = lc.load(merged, device="cpu").embed(["the cat sat"])
    np.testing.assert_allclose(lc.load(run.folder).embed(["the cat sat"]), vectors, atol=1e-3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="no export of ours"):
        lc.export(run, tmp_path / "mine")


JOBS = {
    "train": "run = lc.train(recipe)",
    "plan": "plan = lc.plan(recipe, memory='12GiB')",
    "eval": "lc.evaluate(run.folder, sets=['demo'], resamples=9).write('a.json')",
    "compare": "difference = lc.compare('a.json', 'a.json', resamples=9).mean.difference",
    "export": "folder = lc.export(run, 'exported')",
    "embed": """
import numpy as np
np.save("vectors.npy", lc.load(run.folder).embed(["the cat sat", "a dog ran"]))
""",
    "icl-search": """
best = lc.search_demonstrations(
    recipe.model.id, set_name="demo", limit=5, demonstrations="own.tsv", template='a {text} "'
).best
""",
    "recipes": """
from lowmem_cft.recipe.load import preset_names
names = preset_names()
""",
    "doctor": """
from lowmem_cft.cli.doctor import examine
findings = [finding for finding in examine() if finding.level != "ok"]
""",
    "demo": """
from lowmem_cft.progress import Quiet
from lowmem_cft.training.demo import run_demo
small = ["train.steps=1", "train.logical_batch=4", "model.keep_layers=null", "eval.sets=[demo]"]
metrics, summary = run_demo(Quiet(), offline=True, overrides=[f"model.id={recipe.model.id}", *small])
""",
    "reproduce": """
from lowmem_cft.papers.reproduction import Reproduction
from lowmem_cft.papers.request import Request
paper = Reproduction(Request("cft", "smollm2-135m"), Path("paper"), offline=True)
begun = paper.records.run  # paper.run(Quiet(print), command="") goes through its stages
""",
}


def test_each_command_is_a_few_lines_of_python(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem_cft.cli.app import _COMMANDS

    assert JOBS.keys() == _COMMANDS.keys()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOWMEM_CFT_DATA", raising=False)
    (tmp_path / "own.tsv").write_text("sentence\tword\nthe cat sat .\tcat\n")
    names = {"lc": lc, "Path": Path, "recipe": make_recipe(train={"steps": 1})}
    for job, code in JOBS.items():
        assert len(code.strip().splitlines()) <= 6, job
        exec(code, names)
    assert names["difference"] == 0
    assert "demo" in names["names"]
    assert names["summary"].model == names["recipe"].model.id
    assert np.load(tmp_path / "vectors.npy").shape[0] == 2
