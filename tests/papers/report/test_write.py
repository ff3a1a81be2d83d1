"""The report of a reproduction, from fabricated records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowmem_cft.evaluation.sts import compare
from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts.correlation import pearson, spearman
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, Protocol
from lowmem_cft.evaluation.sts.score import ScoredSet, SetScore
from lowmem_cft.papers.report import plots as reproduce_plots
from lowmem_cft.papers.report.plots import EFFICIENCY, LOSSES, NAMES, SETS, running_mean
from lowmem_cft.papers.report.write import share_of, write_report
from lowmem_cft.papers.request import PAPERS

MTEB, SENTEVAL = PROTOCOLS["mteb"], PROTOCOLS["senteval"]
RESAMPLES = 40
DEV = "STSBenchmark-dev"
METRICS: dict[str, Any] = {
    "before": [],
    "after": [],
    "protocol": "made up",
    "steps": 50,
    "rows": 3000,
    "train_seconds": 50.0,
    "rows_per_s": 60.0,
    "tokens_per_s": 600.0,
    "plan": {"backward_tokens": 256, "forward_tokens": 256},
    "peak_bytes": 2**30,
    "device": "made up",
    "versions": {},
}
ABLATIONS = {
    "ablation-lr-5e-5": {},
    "ablation-lr-5e-4": {"learning_rate": 5e-4},
    "ablation-prompt": {"template": 'This sentence: "{text}" means | in one word: '},
    "ablation-no-hard-negatives": {"hard_negatives": "none"},
}


# --- fabricated records -------------------------------------------------------------------


class Fabricated:
    """A folder of records; every stage is written as the program writes it."""

    def __init__(self, folder: Path, paper: str, model: str, **more: Any) -> None:
        self.folder = folder
        self.finished = 0
        (folder / "stages").mkdir(parents=True)
        (folder / "evals").mkdir()
        cft = paper == "cft"
        values = {
            "paper": paper,
            "model": model,
            "recipe": f"{paper}-{model}",
            "command": f"lowmem-cft reproduce {paper} --model {model} --hours 2",
            "request": {"paper": paper, "model": model, "hours": 2.0, "budget": "12GiB"},
            "share": {
                "training_steps": [300, 4593],
                "ablation_steps": [50, 500] if cft else None,
                "transfer_rows_per_split": 500,
                "icl_pairs": [200, 1500],
                "hours": 2.0,
                "budget": "12GiB",
            },
            "ablation_baseline": "ablation-lr-5e-5" if cft else None,
            "departures": ["Trained on other data."],
            "machine": {"processor": "A made-up chip"},
            "versions": {"torch": "9.9"},
        }
        (folder / "reproduction.json").write_text(json.dumps({**values, **more}))

    def stage(
        self, name: str, kind: str, result: dict[str, Any], inputs: dict[str, Any] | None = None
    ) -> None:
        self.finished += 1
        values = {
            "name": name,
            "kind": kind,
            "what": f"what {name} is",
            "inputs": inputs or {},
            "inputs_sha256": f"{self.finished:064d}",
            "seconds": 60.0,
            "flops": 0.0,
            "versions": {},
            "finished": f"2026-01-02T03:{self.finished:02d}:00+00:00",
            "result": result,
        }
        (self.folder / "stages" / f"{name}.json").write_text(json.dumps(values))

    def evaluate(
        self,
        name: str,
        noise: float,
        protocol: Protocol | None = MTEB,
        names: tuple[str, ...] = (),
        set_pairs: int = 60,
    ) -> dict[str, Any]:
        """Sets of 60 pairs, of the same gold scores whatever the noise."""
        wanted = names or tuple(entry.name for entry in (protocol or MTEB).sets)
        sets = []
        for one in wanted:
            draw = np.random.default_rng(sum(map(ord, one)))
            gold = draw.uniform(0, 5, 60)
            cosine = gold / 5 + noise * draw.normal(size=60)
            score = SetScore(
                one, spearman(cosine, gold), 60, set_pairs, "made up", pearson(cosine, gold), "v1"
            )
            sets.append(ScoredSet(score, cosine, gold, "f" * 64))
        found = eval_report.report(name, sets, protocol=protocol, num_resamples=RESAMPLES)
        path = self.folder / "evals" / f"{name}.json"
        eval_report.write(found, path)
        result = {**eval_report.as_json(found), "report": f"evals/{name}.json"}
        self.stage(name, "evaluate", result)
        return result

    def train(self, name: str, *, sections: dict[str, Any] | None = None, **changed: Any) -> None:
        rate = changed.get("learning_rate", 5e-5)
        recipe = {
            "lora": {"rank": 8},
            "text": {"template": changed.get("template", "{text}")},
            "loss": {"hard_negatives": changed.get("hard_negatives", "batch")},
            "train": {"learning_rate": rate, "steps": 50, **(sections or {})},
            "output": {"name": name},
        }
        result = {
            "run": f"runs/{name}",
            "steps": 50,
            "published_steps": 500,
            "learning_rate": rate,
            "logical_batch": 60,
            "rows": 3000,
            "losses": [[step, 3.0 / step] for step in range(1, 51)],
            "curve": {
                "set": DEV,
                "points": [[step, 0.3 + step / 200] for step in range(0, 51, 10)],
            },
            "metrics": METRICS,
        }
        self.stage(name, "train", result, {"recipe": recipe, "needs": {"data": "1" * 64}})

    def data(self) -> None:
        result = {
            "sources": [{"path": "/somewhere/else/some.csv", "rows": 27560, "sha256": "a" * 64}],
            "rows": 27560,
            "published_rows": 275601,
            "distinct_texts": 70001,
            "texts_in_evaluation": 12,
        }
        self.stage("data", "data", result)

    def search(self) -> None:
        def trial(sentence: str | None, word: str | None, *numbers: float) -> dict[str, Any]:
            names = ("spearman", "low", "high", "gain", "gain_low", "gain_high")
            return {"sentence": sentence, "word": word, **dict(zip(names, numbers, strict=True))}

        trials = [
            trial(f"Sentence {i} | a", "Word", 0.8 - i / 100, 0.7, 0.9, 0.1, 0.05, 0.15)
            for i in range(15)
        ]
        trials.append(trial(None, None, 0.5, 0.4, 0.6, 0.0, 0.0, 0.0))
        template = 'This sentence : "{text}" means in one word:"'
        result = {"trials": trials, "set": DEV, "pairs": 200, "template": template}
        self.stage("icl-search", "search", {**result, "best_template": f"X{template}"})

    def transfer(self, name: str, accuracy: float) -> None:
        tasks = [
            {
                "name": task,
                "accuracy": accuracy,
                "protocol": "SentEval's splits",
                "num_rows": rows,
                "task_rows": {"all": 10662} if task == "MR" else rows,
            }
            for task, rows in (("MR", {"all": 500}), ("TREC", {"train": 5452, "test": 500}))
        ]
        self.stage(name, "transfer", {"tasks": tasks, "mean": accuracy})

    def ablations(self) -> None:
        for i, (name, changed) in enumerate(ABLATIONS.items()):
            self.train(name, **changed)
            self.evaluate(f"evaluate-{name}", 0.2 + i / 10, None, (DEV,))

    def report(self) -> tuple[str, dict[str, Any]]:
        write_report(self.folder)
        out = self.folder / "report"
        return (out / "report.md").read_text(), json.loads((out / "report.json").read_text())


def whole_cft(folder: Path, model: str = "phi-2") -> Fabricated:
    made = Fabricated(folder, "cft", model)
    made.evaluate("base", 0.8)
    made.data()
    made.train("train")
    made.evaluate("evaluate", 0.2)
    made.ablations()
    made.transfer("transfer-base", 0.6)
    made.transfer("transfer-trained", 0.65)
    return made


def row_of(text: str, first: str, after: str = "") -> list[str]:
    """The cells of the table row that begins with `first`, the first one after a heading."""
    lines = text[text.index(after) :].splitlines()
    (line, *_) = [line for line in lines if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    made = whole_cft(tmp_path_factory.mktemp("phi") / "run")
    made.report()
    return made


def read_text(made: Fabricated) -> str:
    return (made.folder / "report" / "report.md").read_text()


# --- ours beside the published figures ----------------------------------------------------


def test_the_table_has_the_records_figures(phi: Fabricated) -> None:
    text, folder = read_text(phi), phi.folder
    base, trained = (
        json.loads((folder / "evals" / f"{name}.json").read_text()) for name in ("base", "evaluate")
    )
    paired = compare.compare(folder / "evals/base.json", folder / "evals/evaluate.json", RESAMPLES)
    published = PAPERS["cft"].published("phi-2", "fine-tuned")
    assert published is not None
    for i, one in enumerate(trained["sets"]):
        cells = row_of(text, one["name"])
        before, difference = base["sets"][i], paired.sets[i]
        assert cells[1] == "60"
        for place, side in ((2, before), (4, one)):
            low, high = (100 * side["interval"][end] for end in ("low", "high"))
            assert cells[place] == f"{100 * side['spearman']:.2f} ({low:.2f} to {high:.2f})"
        assert cells[5] == f"{published.sets[one['name']].value:.2f} ‡"
        low, high = (100 * end for end in (difference.interval.low, difference.interval.high))
        assert cells[6] == f"{100 * difference.difference:+.2f} ({low:+.2f} to {high:+.2f})"
        assert difference.difference > 0.05
    mean = row_of(text, "**mean**")
    assert mean[2].startswith(f"{100 * base['mean']:.2f} (")
    assert (mean[3], mean[5]) == ("32.21 ‡", "70.89 ‡")
    assert mean[6].startswith(f"{100 * paired.mean.difference:+.2f} (")


def test_a_known_bug_is_said(phi: Fabricated) -> None:
    text = read_text(phi)
    assert "‡ trained: a known bug. Phi-2's tokenizer ignores" in text
    assert "Expect more than 70.89" in text
    assert "†" not in text


def test_what_share_it_is(phi: Fabricated) -> None:
    first = read_text(phi).split("\n\n")[1]
    assert "Training: 50 of 4,593 (1.1 %) of one epoch's optimizer steps, done." in first
    assert "An ablation: 50 of 500 (10 %)" in first
    assert "27,560 of 275,601 (10 %) rows" in first
    assert "at most 500 rows of a split" in first
    assert "2 h and 12GiB of memory" in first
    assert "Done: 12 of the paper's 14 stages" in first


def test_circumstances_and_stages(phi: Fabricated) -> None:
    text = read_text(phi)
    for wanted in ("A made-up chip", "torch 9.9", "--model phi-2 --hours 2", "2026-01-02 03:00 to"):
        assert wanted in text
    assert "In all 0.23 hours." in text
    cells = row_of(text, "data", "## Stages")
    assert cells[1:3] == ["what data is", "60"]
    assert cells[5] == f"`{2:064d}`"
    assert row_of(text, "some.csv")[1:] == ["27,560", f"`{'a' * 64}`"]
    assert "/somewhere" not in text + (phi.folder / "report" / "report.json").read_text()
    assert "- Stages not run: ablation-lr-5e-3, evaluate-ablation-lr-5e-3." in text
    assert "- Beyond the paper, and not run either: icl-search." in text
    assert "- Trained on other data." in text


def test_training_data_seen_in_evaluation_are_said(phi: Fabricated) -> None:
    assert "70,001 distinct texts, of which 12 stand word for word" in phi.report()[0]
    path = phi.folder / "stages" / "data.json"
    record = json.loads(path.read_text("utf-8"))
    record["result"]["sources"][0] |= {"path": "someone/rows", "sha256": None}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert row_of(phi.report()[0], "someone/rows")[1:] == ["27,560", "-"]


def test_written_again_it_is_the_same(phi: Fabricated) -> None:
    before = {path: path.read_bytes() for path in sorted((phi.folder / "report").iterdir())}
    write_report(phi.folder)
    assert {path: path.read_bytes() for path in (phi.folder / "report").iterdir()} == before
    assert {path.name for path in before} == {"report.md", "report.json", *NAMES}


def test_second_hand_figures_and_cut_sets_are_marked(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "gemma-2b")
    made.evaluate("base", 0.8, set_pairs=100)
    text, values = made.report()
    assert row_of(text, "STS12")[2].endswith(" §")
    assert row_of(text, "STS12")[3] == "43.83 †"
    assert row_of(text, "STS17")[3] == "-"
    assert row_of(text, "STS12")[4:] == ["not run", "75.80 †", "-"]
    assert row_of(text, "**mean**")[5] == "81.56 †"
    assert "† Not verified: copied at second hand" in text
    assert "§ Not the protocol's whole set" in text
    assert "a third party measured 75.71" in text
    assert "of low confidence" in text
    first = values["sts"]["rows"][0]
    assert first["published"]["base"]["verified"] is False
    assert first["ours"]["base"]["whole"] is False


def test_a_mean_over_fewer_sets_has_its_own_published_one(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.evaluate("base", 0.8, names=("STS12", "STS13"))
    made.evaluate("evaluate", 0.2, names=("STS12", "STS14"))
    text, _ = made.report()
    mean = row_of(text, "**mean**")
    assert mean[3] == f"{(7.27 + 18.38) / 2:.2f}"
    assert mean[5] == f"{(76.38 + 81.55) / 2:.2f}"
    assert "computed here over the 2 sets" in text
    assert "our mean is over 2 sets instead of the protocol's" in text
    assert "trained - base: no paired difference (different sets" in text
    assert mean[6] == "-"


def test_another_protocol_is_called_out(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "prompteol", "opt-1.3b")
    made.evaluate("base", 0.8, MTEB)
    text, _ = made.report()
    assert "scored by another protocol" in text
    assert "than the published figures (senteval): the two are not comparable" in text


# --- the second paper, and a model of no paper --------------------------------------------


def test_prompteol(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "prompteol", "opt-1.3b")
    made.evaluate("base", 0.8, SENTEVAL)
    made.search()
    made.evaluate("evaluate-icl", 0.5, SENTEVAL)
    made.transfer("transfer-base", 0.8)
    text, values = made.report()
    cells = row_of(text, "STSBenchmark-test")
    assert [cells[i] for i in (3, 5, 7)] == ["73.21 †", "78.80", "87.71"]
    assert cells[8].startswith("+")
    assert cells[9] == "-"
    mean = row_of(text, "**mean**")
    assert [mean[i] for i in (3, 5, 7)] == ["73.18 †", "77.52", "84.79"]
    assert "Ablations" not in text
    assert "scale OPT's attention twice" in text
    # demonstrations: ten, and none wherever it stands
    assert "relating to switzerland or its people." in text
    assert "improves its mean by 4.34 points" in text
    assert "15 demonstrations were tried on 200 pairs" in text
    assert "15 score higher than no demonstration" in text
    assert row_of(text, "Sentence 9 \\| a -> Word")[1] == "10"
    assert "Sentence 10 " not in text
    assert row_of(text, "none") == ["none", "16", "50.00 (40.00 to 60.00)", "-"]
    assert len(values["search"]["trials"]) == 16
    # transfer: cut rows are marked, the interval is Wilson's
    cells = row_of(text, "MR")
    assert cells[1:] == ["500", "80.00 (76.27 to 83.27) §", "88.06 †", "not run", "-"]
    assert row_of(text, "TREC")[2:4] == ["80.00 (76.27 to 83.27)", "95.00 †"]
    assert row_of(text, "MRPC")[2:4] == ["not run", "73.97 †"]


@pytest.mark.parametrize(
    ("paper", "others"),
    [("cft", ("MiniCPM-2B", "Phi-2", "Gemma-2B")), ("prompteol", ("OPT 13B", "LLaMA 30B"))],
)
def test_a_model_of_no_paper(tmp_path: Path, paper: str, others: tuple[str, ...]) -> None:
    made = Fabricated(tmp_path / "run", paper, "smollm2-135m")
    protocol = MTEB if paper == "cft" else SENTEVAL
    made.evaluate("evaluate", 0.2, protocol)
    text, _ = made.report()
    assert "with SmolLM2-135M-Instruct, which is **no model of the paper**" in text
    first, second = text.split("## Other models, for orientation only")
    assert "published |" not in first
    for name in others:
        assert f"{name} (another model), published" in second
        assert name not in first.split("## Set by set")[1].split("### Notes")[0]
    ours = row_of(first, "STS12")[3 if paper == "cft" else 4]
    assert row_of(second, "STS12")[1] == ours
    if paper == "cft":
        assert row_of(second, "STS12")[2:5] == ["76.38", "61.62 ‡", "75.80 †"]
        assert "‡ Phi-2: a known bug" in second
        assert "† Not verified" in first


def test_a_size_without_a_fine_tuned_figure(tmp_path: Path) -> None:
    text, _ = Fabricated(tmp_path / "run", "prompteol", "opt-125m").report()
    assert row_of(text, "**mean**")[2:8] == [
        "not run",
        "67.00 †",
        "not run",
        "67.46",
        "not run",
        "-",
    ]
    assert "No fine-tuned figures of OPT 125M are published" in text


# --- missing stages, damaged records ------------------------------------------------------


@pytest.mark.parametrize("paper", ["cft", "prompteol"])
def test_nothing_run_yet(tmp_path: Path, paper: str) -> None:
    model = "minicpm-2b" if paper == "cft" else "opt-1.3b"
    made = Fabricated(tmp_path / "run", paper, model)
    text, values = made.report()
    assert "None was run yet." in text
    assert "Done: 0 of the paper's" in text
    steps = "one epoch's" if paper == "cft" else "the published"
    assert f"300 of 4,593 (6.5 %) of {steps} optimizer steps, planned" in text
    assert values["not_run"] == PAPERS[paper].own_stages(None)
    assert len(values["not_run"]) == (14 if paper == "cft" else 8)
    assert sorted(path.name for path in (made.folder / "report").iterdir()) == [
        "report.json",
        "report.md",
    ]


def test_any_one_stage_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce_plots, "draw", lambda found, out: [])  # for time
    made = whole_cft(tmp_path / "run")
    stages = sorted((made.folder / "stages").glob("*.json"))
    assert len(stages) == 14
    for path in stages:
        hidden = path.rename(path.with_suffix(".hidden"))
        text, values = made.report()
        assert path.stem in [*values["not_run"], *values["beyond_not_run"]]
        assert path.stem in text.split("## What was not done")[1]
        hidden.rename(path)


def test_damaged_records(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"reproduction\.json: cannot be read"):
        write_report(folder)
    made = Fabricated(folder, "cft", "phi-2")
    made.data()
    path = folder / "stages" / "data.json"
    good = path.read_text()
    for wrong, message in (
        (good[:100], r"data\.json: no record of a reproduction \(file: Invalid JSON"),
        (
            good.replace('"rows": 27560, "published', '"published'),
            r"\(result\.rows: Field required",
        ),
        (good.replace('"kind": "data"', '"kind": "other"'), r"\(kind: Input should be"),
        (good.replace('"name": "data"', '"name": "base"'), r"got a record of 'base'"),
    ):
        assert wrong != good
        path.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            write_report(folder)
    path.rename(path.with_name("base.json")).write_text(
        good.replace('"name": "data"', '"name": "base"')
    )
    with pytest.raises(ValueError, match=r"base\.json: got kind 'data', wanted a result of eval"):
        write_report(folder)


# --- ablations ----------------------------------------------------------------------------


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
    wanted = ("`5e-05`", "`{text}`", "`batch`")
    for title, value in zip(titles, wanted, strict=True):
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


# --- by step, plots -----------------------------------------------------------------------


def test_scores_by_step(phi: Fabricated) -> None:
    text = read_text(phi)
    part = text[text.index("## Data efficiency") :]
    header = next(line for line in part.splitlines() if line.startswith("| step"))
    assert header.count("(batch 60)") == 5
    assert row_of(part, "0")[1:] == ["30.00"] * 5
    assert row_of(part, "50")[1:] == ["55.00"] * 5


def test_many_steps_are_thinned_in_the_table_only(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.train("train")
    path = made.folder / "stages" / "train.json"
    values = json.loads(path.read_text())
    values["result"]["curve"]["points"] = [[step, step / 1000] for step in range(101)]
    path.write_text(json.dumps(values))
    text, found = made.report()
    assert "Every 5th step that was scored" in text
    assert row_of(text, "100")[1] == "10.00"
    assert row_of(text, "5")[1] == "0.50"
    assert "\n| 4 |" not in text
    assert len(found["trainings"]["train"]["curve"]["points"]) == 101


def test_plots_are_pngs(phi: Fabricated) -> None:
    from matplotlib import image

    text = read_text(phi)
    for name in NAMES:
        path = phi.folder / "report" / name
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"]({name})" in text
        pixels = image.imread(path)
        assert pixels.shape[:2] == (660, 1200)
        assert len(np.unique(pixels[..., 0])) > 50
        assert np.mean(pixels[..., 0] < 0.9) > 0.005


def test_only_plots_that_have_figures(tmp_path: Path) -> None:
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.evaluate("base", 0.8)
    text, _ = made.report()
    assert SETS in text
    assert EFFICIENCY not in text
    assert LOSSES not in text
    assert not (made.folder / "report" / LOSSES).exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of an earlier report go: they are not of these records."""
    made = Fabricated(tmp_path / "run", "cft", "minicpm-2b")
    made.evaluate("base", 0.8)
    made.report()
    assert (made.folder / "report" / SETS).exists()
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert [path.name for path in write_report(made.folder)] == ["report.md", "report.json"]
    text = read_text(made)
    assert "pip install '.[plots]'" in text
    assert ".png" not in text
    assert not (made.folder / "report" / SETS).exists()


def test_running_mean() -> None:
    assert running_mean([4.0, 2.0, 0.0, 1.0], 2) == [4.0, 3.0, 1.0, 0.5]
    assert running_mean([4.0, 2.0], 1) == [4.0, 2.0]


@pytest.mark.parametrize(
    ("part", "whole", "wanted"),
    [
        (300, 4593, "300 of 4,593 (6.5 %)"),
        (50, 500, "50 of 500 (10 %)"),
        (4592, 4593, "4,592 of 4,593 (99.9 %)"),
        (500, 500, "500 of 500 (100 %)"),
        (1, 4593, "1 of 4,593 (0.022 %)"),
        (1000, 500, "1,000 of 500 (200 %)"),
    ],
)
def test_share(part: int, whole: int, wanted: str) -> None:
    assert share_of(part, whole) == wanted
