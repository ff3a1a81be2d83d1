"""Whole runs of a tiny model: fixtures, an observer, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowmem_cft.cli import app as cli
from lowmem_cft.evaluation.sts import score as evaluate
from lowmem_cft.recipe import schema as recipe
from lowmem_cft.recipe.load import merge, parse_recipe, to_yaml
from lowmem_cft.training.checkpoint import load_state
from lowmem_cft.training.job import assemble
from lowmem_cft.training.records import StepLine
from lowmem_cft.training.runs import open_run
from lowmem_cft.training.trainer import Trainer
from tiny import WORDS


class Silent:
    """An observer that keeps what it is told; `on_step` may act after a step."""

    def __init__(self, on_step: Callable[[StepLine], None] = lambda line: None) -> None:
        self.said: list[str] = []
        self.lines: list[StepLine] = []
        self.on_step = on_step

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, num_steps: int, done: int) -> None:
        self.said.append(f"begin {done}/{num_steps}")

    def step(self, line: StepLine) -> None:
        self.lines.append(line)
        self.on_step(line)

    def scored(self, step: int, scores: list[evaluate.SetScore]) -> None:
        self.said.append(f"scored {step}")


def start(
    made: recipe.Recipe,
    observer: Silent | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    new_rate: bool = False,
) -> Trainer:
    """A trainer on the recipe's run folder, at its first step or after its checkpoint."""
    observer = observer or Silent()
    folder = open_run(made, resume=resume, overwrite=overwrite, new_rate=new_rate)
    state = load_state(folder) if resume else None
    job = assemble(made, observer, last_plan=None if state is None else state.plan)
    return Trainer(job, folder, observer, state, new_rate=new_rate)


def sentences(seed: int, count: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(3, 10))) for _ in range(count)]


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    rows = zip(sentences(1, 40), sentences(2, 40), sentences(3, 40), strict=True)
    triplets = folder / "triplets.jsonl"
    with triplets.open("w") as file:
        for anchor, positive, negative in rows:
            row = {"anchor": anchor, "positive": positive, "negative": negative}
            file.write(json.dumps(row) + "\n")
    pairs = folder / "pairs.tsv"
    scores = np.random.default_rng(4).integers(0, 6, 30)
    lines = [
        f"{a}\t{b}\t{s}" for a, b, s in zip(sentences(5, 30), sentences(6, 30), scores, strict=True)
    ]
    pairs.write_text("sentence1\tsentence2\tscore\n" + "\n".join(lines) + "\n")
    return triplets, pairs


MakeRecipe = Callable[..., recipe.Recipe]


@pytest.fixture
def make_recipe(tiny_folder: Path, corpus_files: tuple[Path, Path], tmp_path: Path) -> MakeRecipe:
    def make(**sections: dict[str, Any]) -> recipe.Recipe:
        base = {
            "model": {"id": str(tiny_folder), "dtype": "fp32"},
            "lora": {"rank": 4, "dropout": 0.1},
            "text": {"max_tokens": 16},
            "data": {"sources": [{"path": str(corpus_files[0])}]},
            "train": {"logical_batch": 16, "steps": 5, "learning_rate": 1e-2, "warmup_steps": 1},
            "memory": {"token_budget": 64},
            "eval": {"sets": [str(corpus_files[1])]},
            "output": {"folder": str(tmp_path / "runs"), "name": "tiny"},
        }
        return parse_recipe(merge(base, sections), "test")

    return make


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the program in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["lowmem-cft", *arguments])
        monkeypatch.setitem(cli._state, "debug", False)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return int(stopped.value.code or 0), out, err

    return run


@pytest.fixture
def recipe_file(make_recipe: Any, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(make_recipe(train={"steps": 2})))
    return path


@pytest.fixture
def finished(command: Run, recipe_file: Path, tmp_path: Path) -> Path:
    code, out, err = command("train", str(recipe_file))
    assert code == 0, err
    assert "Spearman x 100" in out
    return tmp_path / "runs" / "tiny"


class Heard:
    """An observer that keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, num_steps: int, done: int, what: str = "") -> None: ...

    def advance(self, count: int) -> None: ...

    def step(self, line: StepLine) -> None: ...

    def scored(self, step: int, scores: list[Any]) -> None: ...


MEAN = ("--set", "embedding.pooling=mean", "--set", "model.dtype=fp32", "--offline")
