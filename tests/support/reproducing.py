"""Runs of papers with a tiny model, sets cut to a few pairs, and a few steps."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem_cft.evaluation.sts import sets as sts_data
from lowmem_cft.evaluation.sts.protocols import Protocol, StsSet
from lowmem_cft.evaluation.transfer import tasks as transfer_data
from lowmem_cft.evaluation.transfer.tasks import TaskSpec
from lowmem_cft.papers import names, paper_stages, request
from lowmem_cft.papers import reproduction as reproduce
from lowmem_cft.papers.report import plots as reproduce_plots
from lowmem_cft.papers.reproduction import Reproduction
from lowmem_cft.papers.request import PAPERS, Request
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
    monkeypatch.setattr(reproduce_plots, "draw", lambda report, out: [])  # they have their own test
    for module in (paper_stages, reproduce, transfer_data):
        monkeypatch.setattr(module, "SPECS", TASKS)
    shorten(monkeypatch, rows=32, ablation_steps=2)
    monkeypatch.setattr(request, "num_steps", lambda recipe, rows: -(-rows // 8))
    monkeypatch.setattr(names, "DEV_PAIRS", 24)

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


def records_of(run: Reproduction) -> dict[str, dict[str, Any]]:
    """The records as their files have them."""
    files = run.records.stages.glob("*.json")
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def stop(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt
