"""The run of the first paper, whole."""

from __future__ import annotations

import pytest

from lowmem_cft.papers import work as stage_work
from lowmem_cft.papers.cft import ONE_WORD
from reproducing import Ask, records_of, stop
from running import Heard


def test_the_first_paper_whole(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = ("train.learning_rate=5e-3",)
    with monkeypatch.context() as stopped:
        stopped.setattr(stage_work, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            ask(overrides=fast).run(Heard())
    run = ask(overrides=fast)
    assert set(records_of(run)) == {"base", "data"}
    first_done = run.records.path("base").stat().st_mtime_ns
    files = run.run(Heard())
    records = records_of(run)
    assert run.records.path("base").stat().st_mtime_ns == first_done
    ablations = [name for name in records if name.startswith("ablation")]
    assert len(ablations) == 5
    assert set(records) == {
        *("base", "data", "train", "evaluate"),
        *ablations,
        *(f"evaluate-{name}" for name in ablations),
    }
    assert records["train"]["result"]["steps"] == 4
    assert {records[name]["result"]["steps"] for name in ablations} == {2}
    points = records["train"]["result"]["curve"]["points"]
    assert [step for step, _ in points] == [0, 1, 2, 3, 4]
    assert len(records["train"]["result"]["losses"]) == 4
    assert records["data"]["result"]["rows"] == 40
    assert records["data"]["result"]["texts_in_evaluation"] > 0
    assert records["base"]["result"]["mean"] != records["evaluate"]["result"]["mean"]
    assert (run.folder / "runs" / "train" / "model").is_dir()
    assert {"report.md", "report.json"} <= {file.name for file in files}
    assert "STS13" in (run.folder / "report" / "report.md").read_text(encoding="utf-8")
    heard = Heard()
    ask(overrides=fast).run(heard)
    assert sum("done before" in text for text in heard.said) == len(records)


def test_ablations_change_one_thing(ask: Ask) -> None:
    ask(stages=["data"]).run(Heard())
    run = ask()
    stages = {stage.name: stage for stage in run.stages}
    baseline = stages["ablation-lr-5e-5"].inputs()["recipe"]
    assert baseline["train"]["learning_rate"] == run.request.recipe().train.learning_rate == 5e-5
    changes = {}
    for name, stage in stages.items():
        if stage.kind == "train" and name.startswith("ablation"):
            recipe = stage.inputs()["recipe"]
            changes[name] = [
                f"{section}.{key}"
                for section, values in recipe.items()
                for key, value in values.items()
                if value != baseline[section][key]
            ]
    assert changes == {
        "ablation-lr-5e-5": [],
        "ablation-lr-5e-4": ["train.learning_rate"],
        "ablation-lr-5e-3": ["train.learning_rate"],
        "ablation-prompt": ["text.template"],
        "ablation-no-hard-negatives": ["loss.hard_negatives"],
    }
    evaluated = stages["evaluate-ablation-prompt"].inputs()
    assert evaluated["text"]["template"] == ONE_WORD


def test_another_learning_rate_gets_a_baseline_of_its_own(ask: Ask) -> None:
    run = ask(overrides=("train.learning_rate=1e-3",))
    names = [stage.name for stage in run.stages]
    assert "ablation-base" in names
    assert len([name for name in names if name.startswith("ablation")]) == 6
