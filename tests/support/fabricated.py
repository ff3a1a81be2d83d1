"""A reproduction's folder of made-up records, as the program would have written it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_cft.evaluation.sts import report as eval_report
from lowmem_cft.evaluation.sts.correlation import pearson, spearman
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, Protocol
from lowmem_cft.evaluation.sts.score import ScoredSet, SetScore
from lowmem_cft.papers.report.write import write_report

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
        listed = names or tuple(entry.name for entry in (protocol or MTEB).sets)
        sets = []
        for set_name in listed:
            draw = np.random.default_rng(sum(map(ord, set_name)))
            gold = draw.uniform(0, 5, 60)
            cosine = gold / 5 + noise * draw.normal(size=60)
            score = SetScore(
                set_name,
                spearman(cosine, gold),
                60,
                set_pairs,
                "made up",
                pearson(cosine, gold),
                "v1",
            )
            sets.append(ScoredSet(score, cosine, gold, "f" * 64))
        report = eval_report.report(name, sets, protocol=protocol, num_resamples=RESAMPLES)
        path = self.folder / "evals" / f"{name}.json"
        report.write(path)
        result = {**report.to_json(), "report": f"evals/{name}.json"}
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


def read_text(made: Fabricated) -> str:
    return (made.folder / "report" / "report.md").read_text()
