"""A paper is an object: a new one is put on the list, and has stages, estimates and a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_cft.papers import names
from lowmem_cft.papers.paper import Ablation, Paper, PaperFacts, TrainingData
from lowmem_cft.papers.published import Figure, Published
from lowmem_cft.papers.request import PAPERS
from reproducing import Ask
from running import Heard, Run

MODEL = "smollm2-135m"
ROW = Published(
    paper="third",
    model=MODEL,
    variant="fine-tuned",
    sets={"STS12": Figure(value=51.5, source="a page of the third paper", verified=True)},
)
THIRD = Paper(
    name="third",
    facts=PaperFacts("A Third Paper", "0000.00000", "mteb", {MODEL: "SmolLM2"}, ("A note.",)),
    clean_up=False,
    data=TrainingData("third.csv", "https://example.org/third.csv", 32),
    recipes={MODEL: "cft-smollm2-135m"},
    stages=(names.DATA, names.TRAIN, names.EVALUATE),
    beyond=(names.TRANSFER_BASE,),
    ablations=(
        Ablation("ablation-rank-4", "rank 4", "lora.rank", "4", "Rank"),
        Ablation("ablation-none", "the recipe as it is", "lora.rank", None, "Rank"),
    ),
    ablation_steps=2,
    departures=lambda recipe, share: [f"Its rank is {recipe.lora.rank}."],
    rows=(ROW,),
)
STAGES = (
    *("data", "train", "evaluate"),
    *("ablation-none", "evaluate-ablation-none", "ablation-rank-4", "evaluate-ablation-rank-4"),
)


@pytest.fixture(autouse=True)
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAPERS, THIRD.name, THIRD)


def test_its_run_is_reported(ask: Ask) -> None:
    run = ask("third")
    assert {stage.name for stage in run.stages} == set(STAGES)
    assert "Its rank is 8." in run.departures()
    run.run(Heard())
    report = (run.folder / "report" / "report.md").read_text(encoding="utf-8")
    for line in (
        "# Reproduction: third, SmolLM2",
        "| set | pairs | trained, ours | trained, published |",
        "- Published (trained): a page of the third paper.",
        "- A note.",
        "### Rank",
        "- ablation-rank-4: `lora.rank`: `8` -> `4`; nothing else in the inputs differs.",
        "- Beyond the paper, and not run either: transfer-base.",
        "- Its rank is 8.",
    ):
        assert line in report.splitlines()
    assert "Done: 7 of the paper's 7 stages." in report
    (row,) = [line for line in report.splitlines() if line.startswith("| STS12 |")]
    assert row.endswith("| 51.50 |")
    order = [line.split(" | ")[0] for line in report.partition("## Stages")[2].splitlines()]
    assert [name for name in order if name.removeprefix("| ") in STAGES] == [
        f"| {name}" for name in STAGES
    ]


def test_the_command_knows_it(command: Run, tmp_path: Path, tiny_folder: Path) -> None:
    asked = ["reproduce", "third", "--model", MODEL, "--dry-run", "--offline"]
    tiny = ["--set", f"model.id={tiny_folder}", "--set", "model.quantization=none"]
    out = ["--set", "data.sources.0.path=third.csv", "--out", str(tmp_path / "out")]
    code, printed, said = command(*asked, *tiny, *out)
    assert code == 0, said
    assert all(name in printed for name in STAGES)
    assert "missing: third.csv is not in" in said
    assert "of the paper's 1 training steps" in said


def test_ablations_have_a_length() -> None:
    with pytest.raises(AssertionError, match="ablations have a length"):
        Paper(
            name="wrong",
            facts=THIRD.facts,
            clean_up=False,
            data=THIRD.data,
            recipes={},
            stages=(),
            ablations=THIRD.ablations,
        )
