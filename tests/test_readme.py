"""Every command, recipe and code block of the README and the other documents runs as printed.

They run in the documents' order in one folder, as a reader would type them. What they name stands in
for itself in small: the hub's model is a tiny one in a fabricated cache, STS sets and transfer tasks
have few rows.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer

from lowmem_cft.cli.app import app
from lowmem_cft.evaluation.sts.protocols import PROTOCOLS, SETS, StsSet
from lowmem_cft.evaluation.transfer.tasks import SPECS, TaskSpec
from made_sets import write_tsv
from peer_models import put_on_hub
from places import ROOT
from running import Run, sentences
from tiny import save_tiny

DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "kernels/README.md", "bench/README.md"),
    *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md")),
]

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}


@dataclass(frozen=True)
class Block:
    """What stands between fences in a document."""

    document: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line."""
        lines = self.text.splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = [
    Block(name, found[1])
    for name, text in TEXTS.items()
    for found in re.finditer(r"^```\w*\n(.*?)^```", text, re.S | re.M)
]

EXCEPTED = {
    "make demo": "sets up an environment and trains for minutes, or runs this test; CI runs both",
    "--hours 3 --budget": "a paper's run takes hours; each command is shown as a dry run",
}
"""What is not done as printed, and why, by what only that block holds."""


class Reader:
    """Does what a block says, in a folder with small stand-ins for what the documents name."""

    def __init__(self, command: Run, model: Path) -> None:
        self.command, self.model = command, model

    def type(self, words: list[str]) -> str:
        """Run a command line; what it printed."""
        assert words[0] == "lowmem-cft"
        given = [str(self.model) if word == "MODEL" else word for word in words[1:]]
        code, out, err = self.command(*given)
        assert code == 0, f"{shlex.join(words)}\n{out}\n{err}"
        return out

    def shell(self, block: Block) -> None:
        for words in block.commands:
            self.type(words)

    def make(self, block: Block) -> None:
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert [words[0] for words in block.commands] == ["make"] * len(block.commands)
        assert {words[1] for words in block.commands} <= set(targets)

    def dry(self, block: Block) -> None:
        for words in block.commands:
            assert "hours here" in self.type([*dict.fromkeys([*words, "--dry-run"])])

    def triplets(self, block: Block) -> None:
        """The printed row, and more of its kind."""
        names = ("anchor", "positive", "negative")
        assert tuple(json.loads(block.text)) == names
        columns = zip(*(sentences(seed, 1023) for seed in (6, 7, 8)), strict=True)
        rows = [json.dumps(dict(zip(names, row, strict=True))) for row in columns]
        Path("my_triplets.jsonl").write_text(block.text + "\n".join(rows) + "\n")

    def recipe(self, block: Block) -> None:
        Path("mine.yaml").write_text(block.text)

    def mine(self, block: Block) -> None:
        """The commands of a recipe of one's own; another run is there to be compared with."""
        for words in block.commands:
            if words[1] == "compare":
                shutil.copytree("runs/mine", "runs/other")
            self.type(words)
        vectors = np.array(pq.read_table("texts.parquet")["embedding"].to_pylist())
        assert vectors.shape == (7, 64)
        assert np.isfinite(vectors).all()

    def loss(self, block: Block) -> None:
        Path("with_loss.yaml").write_text(Path("mine.yaml").read_text() + block.text)
        self.type(["lowmem-cft", "train", "with_loss.yaml"])
        lines = Path("runs/with_loss/log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        assert all(line["loss"] > 0 and line["masked_share"] < 0.5 for line in log), log

    def python(self, block: Block) -> None:
        names: dict[str, Any] = {}
        exec(block.text, names)
        if "vectors" in names:
            assert len(names["vectors"]) == 2
        if "step" in names:
            assert names["encoder"].weight.grad is not None

    def library(self, block: Block) -> None:
        """In the place of the commands: their run and export are not there yet."""
        shutil.rmtree("runs/mine")
        shutil.rmtree("my-model")
        self.python(block)
        assert Path("my-model/model.safetensors").is_file()

    def wheel(self, block: Block) -> None:
        """On a small wheel with libraries for more than the one CUDA."""
        kept = ["bitsandbytes/lib_cuda130.so", "bitsandbytes/lib_cpu.so", "bitsandbytes/a.py"]
        name = re.findall(r'"(.*\.whl)"', block.text)[0]
        Path("wheels").mkdir()
        with zipfile.ZipFile(f"wheels/{name}", "w") as whole:
            for file in [*kept, "bitsandbytes/lib_cuda118.so"]:
                whole.writestr(file, "")
        self.python(block)
        assert zipfile.ZipFile(name).namelist() == kept

    def tree(self, block: Block) -> None:
        """The folders that are named are there."""
        named = re.findall(r"^( *)([\w/]+)/ ", block.text, re.M)
        assert len(named) > 10
        for indent, name in named:
            assert (ROOT / ("lowmem_cft" if indent else "") / name).is_dir(), name


WAYS: dict[str, Callable[[Reader, Block], None]] = {
    "make demo": Reader.make,
    '{"anchor": ': Reader.triplets,
    "model:\n  id: Qwen/": Reader.recipe,
    "train mine.yaml ": Reader.mine,
    "loss:\n": Reader.loss,
    'model = SentenceTransformer("runs/mine/model")\n$': Reader.python,
    "import lowmem_cft as lc": Reader.library,
    "chunked_gradient(": Reader.python,
    "CachedInfoNCELoss(": Reader.python,
    "-s STSBenchmark-dev -s mine.tsv": Reader.shell,
    "--hours 3 --budget": Reader.dry,
    "recipe/       one YAML file": Reader.tree,
    "import zipfile": Reader.wheel,
    "--suite transfer --limit": Reader.shell,
}
"""What is done with a block, by what it alone holds ($: its end)."""


def ways_of(block: Block) -> list[Callable[[Reader, Block], None]]:
    return [way for held, way in WAYS.items() if held in block.text + "$"]


def test_every_block_has_a_way_to_be_run() -> None:
    assert [len(ways_of(block)) for block in BLOCKS] == [1] * len(BLOCKS), [
        block.text for block in BLOCKS if len(ways_of(block)) != 1
    ]
    assert len(BLOCKS) == len(WAYS)
    assert EXCEPTED.keys() <= WAYS.keys()
    assert len(EXCEPTED) <= 5


def test_the_documents_run_from_top_to_bottom(reader: Reader) -> None:
    for block in BLOCKS:
        (way,) = ways_of(block)
        way(reader, block)


def inline_commands() -> list[tuple[str, list[str]]]:
    """Commands within sentences, by document."""
    return [
        (name, shlex.split(command))
        for name, text in TEXTS.items()
        if name != "docs/log.md"  # of its day
        for command in re.findall(r"`lowmem-cft ([^`]+)`", text)
    ]


def test_commands_within_sentences_have_their_options() -> None:
    known = {
        name: {
            flag
            for parameter in command.params
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        for name, command in typer.main.get_group(app).commands.items()
    }
    listed = inline_commands()
    assert len(listed) >= 5
    for document, (name, *words) in listed:
        assert name in known, f"{document}: {name}"
        flags = {word for word in words if word.startswith("-")}
        assert flags <= known[name] | {"--help"}, f"{document}: {name} {words}"
    flags = set(re.findall(r"`(--[a-z0-9-]+)[^`]*`", TEXTS["README.md"]))
    assert flags
    assert flags <= set().union(*known.values()), flags


def _write_sets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set and task, few rows of each."""

    def shrunk(entry: StsSet) -> StsSet:
        pairs = zip(sentences(1, 24), sentences(2, 24), range(24), strict=True)
        write_tsv(folder / entry.files[0], [(a, b, score) for a, b, score in pairs])
        return replace(entry, num_pairs=24)

    for name, protocol in list(PROTOCOLS.items()):
        small = replace(protocol, sets=tuple(map(shrunk, protocol.sets)))
        monkeypatch.setitem(PROTOCOLS, name, small)
    for key, entry in list(SETS.items()):
        monkeypatch.setitem(SETS, key, shrunk(entry))
    for key, spec in list(SPECS.items()):
        small_spec = replace(spec, splits=dict.fromkeys(spec.splits, 16 * len(spec.classes)))
        _write_task(folder, small_spec)
        monkeypatch.setitem(SPECS, key, small_spec)


def _write_task(folder: Path, spec: TaskSpec) -> None:
    (folder / spec.name).mkdir()
    for number, (split, size) in enumerate(spec.splits.items()):
        labels = [spec.classes[i % len(spec.classes)] for i in range(size)]
        rows = zip(labels, sentences(number, size), sentences(number + 5, size), strict=True)
        text = "\n".join(["label\ttext\ttext2", *map("\t".join, rows), ""])
        (folder / spec.file(split)).write_text(text)


@pytest.fixture
def reader(
    command: Run,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    traced_once: None,
) -> Reader:
    """Someone with data, texts and a hub's cache."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("sklearn")
    import huggingface_hub

    (tmp_path / "data").mkdir()
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(tmp_path / "data"))
    _write_sets(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    put_on_hub(tmp_path / "hub", "Qwen/Qwen3-0.6B", save_tiny(tmp_path / "qwen3", "qwen3"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    pairs = zip(sentences(3, 24), sentences(4, 24), range(24), strict=True)
    scored = write_tsv(Path("my_scored_pairs.tsv"), [(a, b, score) for a, b, score in pairs])
    shutil.copyfile(scored, "mine.tsv")
    Path("texts.txt").write_text("\n".join(sentences(5, 7)) + "\n")
    return Reader(command, tiny_folder)
