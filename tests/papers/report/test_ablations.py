"""Ablations in the report: beside their baseline, with all that differs from it."""

from __future__ import annotations

import json
from pathlib import Path

from fabricated import (
    RESAMPLES,
    Fabricated,
    read_text,
    row_of,
)
from lowmem_cft.evaluation.sts import compare


def test_ablations_beside_their_baseline(phi: Fabricated) -> None:
    text, folder = read_text(phi), phi.folder
    part = text[text.index("## Ablations") : text.index("## Data efficiency")]
    assert "Warning" not in part
    for name, key, values in (
        ("ablation-lr-5e-4", "train.learning_rate", "`5e-05` -> `0.0005`"),
        ("ablation-no-hard-negatives", "loss.hard_negatives", "`batch` -> `none`"),
    ):
        line = f"- {name}: `{key}`: {values}; nothing else in the inputs differs."
        assert line in part
        paired = compare.compare(
            folder / "evals/evaluate-ablation-lr-5e-5.json",
            folder / f"evals/evaluate-{name}.json",
            RESAMPLES,
        ).mean
        low, high = 100 * paired.interval.low, 100 * paired.interval.high
        cells = row_of(part, name)
        assert cells[2] == "50"
        assert cells[4] == f"{100 * paired.difference:+.2f} ({low:+.2f} to {high:+.2f})"
        assert paired.difference < -0.01
    titles = ("### Learning rate", "### Prompt or none", "### With and without hard negatives")
    values = ("`5e-05`", "`{text}`", "`batch`")
    for title, value in zip(titles, values, strict=True):
        cells = row_of(part, "ablation-lr-5e-5", title)
        assert (cells[1], cells[4]) == (value, "baseline")


def test_an_ablation_that_changes_more_is_called_out(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.train("ablation-lr-5e-5")
    made.train(
        "ablation-no-hard-negatives",
        hard_negatives="none",
        learning_rate=1e-5,
        sections={"logical_batch": 40},
    )
    text, values = made.report()
    assert (
        "**Warning**, ablation-no-hard-negatives: not everything else is equal: "
        "train.learning_rate, train.logical_batch differ too." in text
    )
    assert "`train.learning_rate`: `5e-05` -> `1e-05` (**not wanted**)" in text
    assert "`train.logical_batch`: `(absent)` -> `40` (**not wanted**)" in text
    assert "nothing else in the inputs differs" not in text
    (other,) = values["ablations"]["others"]
    assert [change["key"] for change in other["changes"] if not change["named"]] == [
        "train.learning_rate",
        "train.logical_batch",
    ]


def test_inputs_beside_the_recipe_and_what_was_done_count_too(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.train("ablation-lr-5e-5")
    made.train("ablation-lr-5e-4", learning_rate=5e-4)
    path = made.folder / "stages" / "ablation-lr-5e-4.json"
    values = json.loads(path.read_text())
    values["inputs"]["needs"]["data"] = "2" * 64
    values["result"]["steps"] = 49
    path.write_text(json.dumps(values))
    text, _ = made.report()
    assert "not everything else is equal: inputs.needs.data, result.steps differ too" in text


def test_an_ablation_of_nothing_and_one_without_baseline(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.train("ablation-prompt")
    text, _ = made.report()
    assert "ablation-prompt: the baseline was not run: whether all else is equal" in text
    made.train("ablation-lr-5e-5")
    text, _ = made.report()
    assert "text.template does not differ from the baseline's: this is no ablation of it" in text


def test_another_baseline(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "smollm2-135m", ablation_baseline="ablation-lr-5e-4")
    made.train("ablation-lr-5e-5")
    made.train("ablation-lr-5e-4", learning_rate=5e-4)
    made.train("ablation-prompt", learning_rate=5e-4, template="Prompt {text}")
    text, _ = made.report()
    assert "`train.learning_rate`: `0.0005` -> `5e-05`; nothing else" in text
    assert "`text.template`: `{text}` -> `Prompt {text}`; nothing else" in text
    assert "Warning" not in text[text.index("## Ablations") :]
    assert row_of(text, "ablation-lr-5e-4", "### Learning rate")[4] == "baseline"


def test_lost_pairs_are_said(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.ablations()
    (made.folder / "evals" / "evaluate-ablation-prompt.npz").unlink()
    text, _ = made.report()
    assert "ablation-prompt: no paired difference" in text
    assert row_of(text, "ablation-prompt", "### Prompt")[3] != "not run"
