"""Tables as they are read on a screen."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from lowmem_cft.cli import tables
from lowmem_cft.cli.tables import comparison_table, plan_tables, score_table
from lowmem_cft.evaluation.sts import bootstrap, compare
from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.planning.footprint import Footprint
from lowmem_cft.planning.prediction import BatchShape, Predictor
from lowmem_cft.planning.recipe_plan import plan_recipe
from lowmem_cft.recipe.load import load_recipe
from lowmem_cft.units import GIB
from made_reports import scored, scores_of, write_report
from tiny import tiny_config

MTEB = PROTOCOLS["mteb"]


def test_scores_and_intervals_are_readable_in_80_columns() -> None:
    """Whole names of the protocol's sets, and bounds below 0 that are told apart."""
    gold, cosine = scores_of(50, 0, 0.3, ties=False)
    every = [scored(entry.name, gold, cosine) for entry in MTEB.sets]
    every = [replace(of_set, score=replace(of_set.score, own_text=False)) for of_set in every]
    report = eval_report.report("m", every, protocol=MTEB, num_resamples=9)
    low = bootstrap.Interval(-0.272, -0.0134)
    console = Console(file=io.StringIO(), width=80)
    console.print(score_table(replace(report, intervals=[low] * 9)))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for entry in MTEB.sets:
        assert re.search(rf"│ {entry.name}\* .*│-27\.20 to -1\.34 │", shown), shown


def test_a_comparison_says_what_its_mean_and_precision_are(tmp_path: Path) -> None:
    def shown(*paths: Path) -> str:
        console = Console(file=io.StringIO(), width=200)
        console.print(comparison_table(compare.compare(*paths, 10)))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    a, b = (write_report(tmp_path / f"{n}.json", n) for n in (0.4, 0.3))
    plain = shown(a, b)
    assert "│ mean of 3 " in plain
    assert "float32" not in plain
    whole = write_report(tmp_path / "w.json", 0.4, [entry.name for entry in MTEB.sets])
    assert "│ mean  " in shown(whole, whole)
    exact = write_report(tmp_path / "exact.json", 0.3, float32=True)
    assert "B was computed in float32, A in its model's own dtype" in shown(a, exact)
    assert "A was computed in float32, B in its model's own dtype" in shown(exact, a)
    assert compare.compare(a, exact, 10).to_json()["b"]["float32"] is True
    assert "float32" not in shown(exact, exact)


def test_a_plan_explains_its_parts_in_80_columns() -> None:
    recipe = load_recipe("demo")
    plan = plan_recipe(recipe, "cuda", 12 * GIB)
    console = Console(file=io.StringIO(), width=80)
    for table in plan_tables(plan):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for name, size in plan.prediction.parts.items():
        label, size_shown = re.escape(name.replace("_", " ")), f"{size / GIB:.3f}"
        assert re.search(
            rf"│ {label} +│ +{size_shown} │ {re.escape(tables._PARTS[name])} +│", shown
        )
    assert "times plain training on the batch at once" in shown


def test_every_part_and_moment_of_a_prediction_has_words() -> None:
    recipe = load_recipe("demo")
    footprint = Footprint(recipe, tiny_config("llama"), torch.bfloat16, 20, "cuda")
    shape, fixed = BatchShape(100, 3, 20), Predictor(footprint).fixed_parts()
    parts, moments = {*fixed, "slack"}, set()
    for kept in (0, 40, None):
        plan = StepPlan(backward_tokens=40, forward_tokens=80, kept_tokens=kept)
        chunk = Predictor(footprint).chunk(40, 0)
        of_plan = Predictor(footprint)._moments(
            plan, shape, chunk, chunk, 1e6 if kept != 0 else 0.0, all_kept=kept is None
        )
        moments |= of_plan.keys()
        parts |= {name for held in of_plan.values() for name in held}
    assert parts == tables._PARTS.keys()
    assert moments == tables._MOMENTS.keys()
