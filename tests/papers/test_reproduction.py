"""The runs of the papers, whole, with a tiny model and sets cut to a few pairs."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem_cft.evaluation.sts import sets as sts_data
from lowmem_cft.evaluation.sts.protocols import Protocol, StsSet
from lowmem_cft.evaluation.transfer import tasks as transfer_data
from lowmem_cft.evaluation.transfer.tasks import TaskSpec
from lowmem_cft.inference import loading
from lowmem_cft.papers import effort, paper_stages, request
from lowmem_cft.papers import reproduction as reproduce
from lowmem_cft.papers import work as stage_work
from lowmem_cft.papers.cft import ONE_WORD
from lowmem_cft.papers.records import StageRecord
from lowmem_cft.papers.report import plots as reproduce_plots
from lowmem_cft.papers.reproduction import Reproduction
from lowmem_cft.papers.request import PAPERS, Request
from running import Heard
from tiny import WORDS

Ask = Callable[..., Reproduction]


def _sentences(number: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 8))) for _ in range(number)]


def _set(name: str, pairs: int) -> StsSet:
    return StsSet(name, pairs, (f"{name}.tsv",), (), None, None, get_it="nowhere")


SETS = {name: _set(name, 24) for name in ("STS12", "STS13", "STSBenchmark-dev")}
TASKS = {
    "MRPC": TaskSpec("MRPC", {"train": 40, "test": 12}, pairs=True),
    "SST2": TaskSpec("SST2", {"train": 30, "dev": 12, "test": 12}),
}


def _write_data(folder: Path) -> None:
    draw, texts = random.Random(1), _sentences(60)
    for name in SETS:
        rows = [f"{a}\t{b}\t{draw.random():.3f}" for a, b in zip(texts, texts[24:48], strict=False)]
        lines = ["sentence1\tsentence2\tscore", *rows[:24]]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for spec in TASKS.values():
        (folder / spec.name).mkdir()
        for split, size in spec.splits.items():
            rows = [f"{i % 2}\t{draw.choice(texts)}\t{draw.choice(texts)}" for i in range(size)]
            text = "\n".join(["label\ttext\ttext2", *rows]) + "\n"
            (folder / spec.file(split)).write_text(text, encoding="utf-8")
    rows = [
        json.dumps({"anchor": a, "positive": b, "negative": c})
        for a, b, c in zip(texts[:40], texts[10:50], texts[20:], strict=True)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    shown = ["sentence\tword", "the cat sat\tcat", "a dog ran\tdog"]
    (folder / "shown.tsv").write_text("\n".join(shown) + "\n", encoding="utf-8")


def shorten(monkeypatch: pytest.MonkeyPatch, rows: int, ablation_steps: int) -> None:
    """Have the papers trained on so many rows, and their ablations on so many steps."""
    for name, paper in PAPERS.items():
        steps = ablation_steps if paper.ablations else 0
        data = replace(paper.data, rows=rows)
        monkeypatch.setitem(PAPERS, name, replace(paper, data=data, ablation_steps=steps))


@pytest.fixture
def ask(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    traced_once: None,
) -> Ask:
    """Ask for a run that takes four steps, its ablations two."""
    data = tmp_path / "data"
    data.mkdir()
    _write_data(data)
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(data))
    monkeypatch.setenv("LOWMEM_CFT_CACHE", str(tmp_path / "cache"))
    protocols = {
        name: Protocol(name, f"cosine ({name})", (SETS["STS12"], SETS["STS13"]))  # type: ignore[arg-type]
        for name in ("mteb", "senteval")
    }
    monkeypatch.setattr(request, "PROTOCOLS", protocols)
    monkeypatch.setattr(sts_data, "SETS", SETS)
    monkeypatch.setattr(reproduce_plots, "draw", lambda found, out: [])  # they have their own test
    for module in (paper_stages, reproduce, transfer_data):
        monkeypatch.setattr(module, "SPECS", TASKS)
    shorten(monkeypatch, rows=32, ablation_steps=2)
    monkeypatch.setattr(request, "num_steps", lambda recipe, rows: -(-rows // 8))
    monkeypatch.setattr(reproduce, "DEV_PAIRS", 24)

    def make(
        paper: str = "cft",
        folder: str = "out",
        stages: list[str] | None = None,
        overrides: tuple[str, ...] = (),
        **asked: Any,
    ) -> Reproduction:
        given = (
            f"model.id={tiny_folder}",
            "model.quantization=none",
            "model.dtype=fp32",
            f"data.sources=[{{path: {data / 'rows.jsonl'}}}]",
            "train.logical_batch=8",
            "memory.token_budget=64",
            *overrides,
        )
        request = Request(
            paper,
            "smollm2-135m",
            overrides=given,
            demonstrations=str(data / "shown.tsv"),
            **asked,
        )
        return Reproduction(request, tmp_path / folder, stages, offline=True)

    return make


def _records(run: Reproduction) -> dict[str, dict[str, Any]]:
    """The records as their files have them."""
    files = run.records.stages.glob("*.json")
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def _stop(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_the_first_paper_whole(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = ("train.learning_rate=5e-3",)
    with monkeypatch.context() as stopped:
        stopped.setattr(stage_work, "train", _stop)
        with pytest.raises(KeyboardInterrupt):
            ask(overrides=fast).run(Heard())
    run = ask(overrides=fast)
    assert set(_records(run)) == {"base", "data"}
    before = run.records.path("base").stat().st_mtime_ns
    files = run.run(Heard())
    records = _records(run)
    assert run.records.path("base").stat().st_mtime_ns == before
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


def test_the_second_paper_whole(ask: Ask) -> None:
    run = ask("prompteol", transfer_rows=30)
    run.run(Heard())
    records = _records(run)
    assert list(PAPERS["prompteol"].stages) == [stage.name for stage in run.stages]
    assert set(records) == {
        *("base", "icl-search", "evaluate-icl", "data", "train", "evaluate"),
        *("transfer-base", "transfer-trained"),
    }
    search = records["icl-search"]["result"]
    assert len(search["trials"]) == 3
    scores = [trial["spearman"] for trial in search["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert records["evaluate-icl"]["inputs"]["text"]["template"] == search["best_template"]
    if search["trials"][0]["sentence"] is not None:
        assert search["best_template"] != search["template"]
    assert records["base"]["inputs"]["clean_up"] is True
    tasks = records["transfer-base"]["result"]["tasks"]
    assert [(task["name"], task["num_rows"]["train"]) for task in tasks] == [
        ("MRPC", 30),
        ("SST2", 30),
    ]
    assert "adapter_sha256" in records["transfer-trained"]["inputs"]


def test_a_first_paper_run_can_do_the_second_ones_stages(ask: Ask) -> None:
    run = ask(stages=["icl-search", "transfer-base"])
    run.run(Heard())
    records = _records(run)
    assert set(records) == {"icl-search", "transfer-base"}
    assert "in one word" in records["icl-search"]["result"]["template"]


def test_transfer_reads_raw_embeddings(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ask(stages=["transfer-base"])
    found: list[bool] = []

    def loads(recipe: Any, *arguments: Any) -> Any:
        found.append(recipe.embedding.normalize)
        return load(recipe, *arguments)

    load = stage_work.load_by_recipe
    monkeypatch.setattr(stage_work, "load_by_recipe", loads)
    run.run(Heard())
    assert found == [False]


def test_a_stopped_training_goes_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(stages=["data"]).run(Heard())
    with monkeypatch.context() as stopped:
        stopped.setattr(Heard, "step", lambda self, line: line.step == 2 and _stop())
        with pytest.raises(KeyboardInterrupt):
            ask(stages=["train"]).run(Heard())
    heard = Heard()
    ask(stages=["train"]).run(heard)
    assert any("going on after step" in text for text in heard.said)
    once = ask(folder="once", stages=["data", "train"])
    once.run(Heard())
    losses = [_records(run)["train"]["result"]["losses"] for run in (ask(), once)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("stage", "last"), [("base", "STS13"), ("transfer-base", "SST2")])
def test_a_stopped_evaluation_goes_on(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, stage: str, last: str
) -> None:
    """What was embedded is not embedded again, unless it would be embedded otherwise now."""
    embedded: list[int] = []

    def counts(encoder: Any, tokenizer: Any, texts: Any, *arguments: Any, **options: Any) -> Any:
        embedded.append(len(texts))
        return embed(encoder, tokenizer, texts, *arguments, **options)

    embed = loading.embed_texts
    monkeypatch.setattr(loading, "embed_texts", counts)

    def stop_before_the_end(**asked: Any) -> None:
        with monkeypatch.context() as stopped:
            at_last = lambda self, text: text.startswith(last) and _stop()
            stopped.setattr(Heard, "say", at_last)
            with pytest.raises(KeyboardInterrupt):
                ask(stages=[stage], **asked).run(Heard())

    once = ask(folder="once", stages=[stage])
    once.run(Heard())
    whole = embedded.copy()
    embedded.clear()
    stop_before_the_end()
    before = embedded.copy()
    assert len(before) > 0
    assert list((ask().folder / "unfinished" / stage).glob("*.npy"))
    ask(stages=[stage]).run(Heard())
    assert embedded == whole
    assert not (ask().folder / "unfinished" / stage).exists()
    results = [_records(run)[stage]["result"] for run in (ask(), once)]
    assert results[0] == results[1]

    embedded.clear()
    stop_before_the_end(folder="other")
    request = ask(folder="other").folder / "reproduction.json"
    request.unlink()  # begun anew with another text around
    ask(folder="other", stages=[stage], overrides=("text.template='so {text}'",)).run(Heard())
    assert embedded == before + whole


def test_another_request_needs_another_folder(ask: Ask) -> None:
    ask(stages=["data"]).run(Heard())
    with pytest.raises(ValueError, match=r"begun with transfer_rows = None, now it is 30.*`out`"):
        ask(stages=["data"], transfer_rows=30)


def test_hours_cut_what_can_be_cut(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, rows=80_000, ablation_steps=500)
    whole = sum(estimate.effort.flops for estimate in ask().estimates())
    rate = whole / (10 * 3600)  # the whole run takes ten hours
    rates = dict.fromkeys(("evaluate", "train", "search", "transfer"), rate)
    monkeypatch.setattr(effort.Efforts, "rates", lambda self, records: rates)
    run = ask(hours=4.0)
    assert sum(estimate.hours for estimate in run.estimates()) == pytest.approx(4.0, rel=0.01)
    ours, published = run.share.training_steps
    assert published == 10_000
    assert 3_900 < ours < 4_000
    ablation = run.share.ablation_steps
    assert ablation is not None
    assert ablation[0] / ablation[1] == pytest.approx(ours / published, rel=0.01)
    assert f"{ours:,} of the paper's 10,000" in run.share.describe()
    assert any(f"has {ours:,} of 10,000 steps" in said for said in run.departures())
    ask(stages=["data"], hours=4.0).run(Heard())
    recipe = {stage.name: stage for stage in run.stages}["train"].inputs()["recipe"]
    assert recipe["train"]["warmup_steps"] == round(100 * ours / published)
    with pytest.raises(ValueError, match=r"most of it evaluation; give more hours"):
        _ = ask(folder="other", hours=1e-6).share
    assert ask(folder="other", hours=400.0).share.training_steps == (10_000, 10_000)


def test_the_share_stays_as_it_was_begun(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, rows=80_000, ablation_steps=2)
    rates = dict.fromkeys(("evaluate", "train", "search", "transfer"), 1e12)
    monkeypatch.setattr(effort.Efforts, "rates", lambda self, records: rates)
    whole = sum(estimate.hours for estimate in ask().estimates())
    run = ask(hours=whole / 2, stages=["data"])
    run.run(Heard())
    share = run.share
    assert share.training_steps[0] < share.training_steps[1]
    rates.update(train=5e11)
    assert ask(hours=whole / 2).share == share


def test_rates_are_those_of_stages_that_are_done(ask: Ask) -> None:
    efforts = effort.Efforts(ask().request.recipe())
    measured = efforts.rates([])
    assert set(measured.values()) == {measured["train"]}
    assert measured["train"] > 1e6
    done = [
        StageRecord[Any].model_construct(kind="train", flops=flops, seconds=seconds)
        for flops, seconds in ((6e9, 2.0), (0.0, 1.0))
    ]
    assert efforts.rates(done)["train"] == pytest.approx(2e9)
    assert efforts.rates(done)["evaluate"] == measured["evaluate"]


def test_models_are_those_of_the_recipes() -> None:
    assert set(PAPERS["cft"].recipes) == {"minicpm-2b", "phi-2", "gemma-2b", "smollm2-135m"}
    assert {"opt-125m", "opt-13b", "llama-7b", "smollm2-135m"} <= set(PAPERS["prompteol"].recipes)


def test_missing_training_data_stop_before_all_work(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paper = ("data.sources=[{path: nli_for_simcse.csv}]",)
    run, heard = ask(overrides=paper), Heard()
    missing = rf"nli_for_simcse\.csv is not in {re.escape(str(tmp_path))}; download it from https"
    with pytest.raises(ValueError, match=missing):
        run.run(heard)
    assert [text for text in heard.said if text.startswith("[")] == [
        "[1/14] data: what is trained on"
    ]
    ask().run(Heard())  # what it advises: other rows, in the same folder
    assert "data" in _records(ask())
    assert ask().missing_data() is None


def test_length_is_counted_by_the_papers_recipe_not_by_the_users() -> None:
    for paper, model, steps in (
        ("cft", "minicpm-2b", 4_594),
        ("prompteol", "opt-1.3b", 1_077),
        ("prompteol", "llama-13b", 1_379),
    ):
        assert Request(paper, model).published_steps == steps
    shorter = Request("cft", "minicpm-2b", overrides=("train.steps=100",))
    assert (shorter.whole_steps, shorter.published_steps) == (100, 4_594)
    larger = Request("cft", "minicpm-2b", overrides=("train.logical_batch=600",))
    assert (larger.whole_steps, larger.published_steps) == (460, 4_594)


def test_anew_means_from_the_beginning(ask: Ask) -> None:
    stages = ["data", "train", "icl-search"]
    run = ask(stages=stages)
    run.run(Heard())
    runs, trials = run.folder / "runs" / "train", run.folder / "icl" / "trials.jsonl"
    before = [path.stat().st_mtime_ns for path in (runs / "log.jsonl", trials)]
    heard = Heard()
    ask(stages=stages).run(heard, redo=["train", "icl-search"])
    after = [path.stat().st_mtime_ns for path in (runs / "log.jsonl", trials)]
    assert all(late > early for early, late in zip(before, after, strict=True))
    assert not any("going on after" in text or " are in " in text for text in heard.said)
    assert (run.folder / "runs" / "train.old").is_dir()
    with pytest.raises(ValueError, match=r"`redo`: got 'trian', wanted one of data, train"):
        ask(stages=stages).run(Heard(), redo=["trian"])


def test_data_that_changed_are_noticed(ask: Ask, tmp_path: Path) -> None:
    ask(stages=["data"]).run(Heard())
    rows = tmp_path / "data" / "rows.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").replace("cat", "dog"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.json: done with other inputs.*`redo` data"):
        ask(stages=["data"]).run(Heard())


def test_memory_may_change_in_a_folder(ask: Ask) -> None:
    ask(stages=["data"], budget="8GiB").run(Heard())
    heard = Heard()
    ask(stages=["data"], budget="4GiB").run(heard)
    assert heard.said[0].endswith("done before")


def test_a_damaged_file_of_the_request_is_named(ask: Ask) -> None:
    run = ask(stages=["data"])
    run.run(Heard())
    (run.folder / "reproduction.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"reproduction\.json: no record of a reproduction"):
        ask(stages=["data"])


def test_overlap_with_evaluation_is_of_texts_as_they_are(ask: Ask) -> None:
    """Clean-up adds a full stop, and would hide that a training text is scored on."""
    counts = []
    for paper in ("cft", "prompteol"):
        run = ask(paper, folder=paper, stages=["data"])
        run.run(Heard())
        counts.append(_records(run)["data"]["result"]["texts_in_evaluation"])
    assert counts[0] == counts[1] > 0
