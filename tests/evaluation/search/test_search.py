"""The search for a demonstration: it goes on where it stopped, and its best is the best."""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import spearmanr

from lowmem_cft.data.rows import ScoredPair
from lowmem_cft.evaluation.search import search as icl
from lowmem_cft.evaluation.search.demonstrations import PROMPTEOL, Demonstration
from lowmem_cft.evaluation.sts import bootstrap
from lowmem_cft.evaluation.sts.sets import LoadedSet, sampled
from lowmem_cft.inference import embed as inference
from lowmem_cft.inference import loading
from lowmem_cft.inference import prefix_sharing as sharing
from lowmem_cft.inference.embed import Vectors
from lowmem_cft.inference.loading import load_model
from lowmem_cft.model.exported import RECORD
from lowmem_cft.model.prefix import NotShared
from running import Run

WORDS = ("Riding", "Music", "Smoking", "Baking", "Swimming")
DEMONSTRATIONS = [Demonstration(f"This is about number {i}.", w) for i, w in enumerate(WORDS)]
IDENTITY = {"model": "a/model", "set": "some"}
BESIDE_WORDS = {word: 0.15 * (1 + i * 3 % 5) for i, word in enumerate(WORDS)}
"""How much noise a word brings into the embeddings; "Riding" and none bring least and 0.35."""


def drawn(*key: str) -> Any:
    return np.random.default_rng(zlib.crc32("\t".join(key).encode())).normal(size=16)


def make_set(count: int = 80) -> LoadedSet:
    texts = [(f"text {i}", f"text {i} too") for i in range(count)]
    gold = [float(drawn(a) @ drawn(b) / 16 + 0.1 * drawn(a, b)[0]) for a, b in texts]
    pairs = [ScoredPair(a, b, score) for (a, b), score in zip(texts, gold, strict=True)]
    return LoadedSet("some", pairs, None, "some.tsv")


SET = make_set()


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about intervals."""
    monkeypatch.setattr(
        icl, "resampled_spearman", partial(bootstrap.resampled_spearman, num_resamples=20)
    )


class Stopped(Exception):
    pass


class Embedding:
    """Embeds under a template, counts the times of each, and can stop at one."""

    def __init__(self, stop_before: int = 99) -> None:
        self.templates: list[str] = []
        self.stop_before = stop_before

    def __call__(self, template: str) -> Callable[[Sequence[str]], Vectors]:
        noise = next((n for word, n in BESIDE_WORDS.items() if f'"{word}"' in template), 0.35)

        def embed(texts: Sequence[str]) -> Vectors:
            if len(self.templates) == self.stop_before:
                raise Stopped
            self.templates.append(template)
            rows = [
                drawn(text) + noise * drawn("noise", text) + 0.05 * drawn(template, text)
                for text in texts
            ]
            return np.array(rows, dtype=np.float32)

        return embed


class Listener:
    """Keeps what a search tells."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.total = self.done = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, num_steps: int, done: int, what: str = "") -> None:
        assert what == "demonstrations"
        self.total, self.done = num_steps, done

    def advance(self, count: int) -> None:
        self.done += count


def search(folder: Path, embedding: Embedding, **other: Any) -> tuple[list[Any], Listener]:
    listener = Listener()
    values: dict[str, Any] = {
        "scored_set": SET,
        "template": PROMPTEOL,
        "demonstrations": DEMONSTRATIONS,
        "identity": IDENTITY,
    } | other
    trials = icl.search(embedding, folder=folder, observer=listener, **values)
    return trials, listener


def scored_by_hand(template: str) -> float:
    embed = Embedding()(template)
    a, b = (embed([getattr(p, side) for p in SET.pairs]) for side in ("sentence1", "sentence2"))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(spearmanr(cosine, [pair.score for pair in SET.pairs]).statistic)


@pytest.mark.usefixtures("few_resamples")
def test_the_best_is_the_best(tmp_path: Path) -> None:
    trials, listener = search(tmp_path, Embedding())
    wanted = {None: scored_by_hand(PROMPTEOL)} | {
        demonstration: scored_by_hand(demonstration.before(PROMPTEOL))
        for demonstration in DEMONSTRATIONS
    }
    assert len(set(wanted.values())) == len(wanted) == len(trials) == 6
    order = sorted(wanted, key=lambda demonstration: -wanted[demonstration])
    assert [trial.demonstration for trial in trials] == order
    assert order[0] is not None
    assert None in order[1:5], "the plain template should be neither best nor worst here"
    for trial in trials:
        assert trial.spearman == pytest.approx(wanted[trial.demonstration], abs=1e-6)
    best = trials[0]
    assert best.template(PROMPTEOL) == best.demonstration.before(PROMPTEOL)
    assert (listener.total, listener.done, len(listener.said)) == (6, 6, 6)
    assert listener.said[0].startswith("1/6  ")
    assert "without a demonstration" in listener.said[0]


def test_intervals_and_the_paired_gain(tmp_path: Path) -> None:
    trials, _ = search(tmp_path, Embedding())
    plain = next(trial for trial in trials if trial.demonstration is None)
    assert (plain.gain, plain.gain_low, plain.gain_high) == (0, 0, 0)
    for trial in trials:
        assert trial.low < trial.spearman < trial.high
        assert trial.high - trial.low < 0.6
        if trial is plain:
            continue
        assert trial.gain == pytest.approx(trial.spearman - plain.spearman)
        assert trial.gain_low < trial.gain < trial.gain_high
        # drawn apart, the two would vary together in no resample, and the gain much more
        apart = ((plain.high - plain.low) ** 2 + (trial.high - trial.low) ** 2) ** 0.5
        assert trial.gain_high - trial.gain_low < 0.8 * apart
    assert bootstrap.RESAMPLES >= 1000


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("stop_before", range(7))
def test_stopped_anywhere_it_repeats_nothing(tmp_path: Path, stop_before: int) -> None:
    whole, _ = search(tmp_path / "whole", Embedding())
    first, second = Embedding(stop_before), Embedding()
    if stop_before < 6:
        with pytest.raises(Stopped):
            search(tmp_path / "stopped", first)
    else:
        search(tmp_path / "stopped", first)
    trials, listener = search(tmp_path / "stopped", second)
    assert trials == whole
    together = first.templates + second.templates
    assert len(together) == len(set(together)) == 6
    assert len(first.templates) == stop_before
    assert listener.total == listener.done == 6
    if stop_before:
        assert listener.said[0].startswith(f"{stop_before} of 6 are in ")
    if stop_before < 6:
        assert listener.said[-1].startswith("6/6  ")


@pytest.mark.usefixtures("few_resamples")
def test_further_demonstrations_are_added(tmp_path: Path) -> None:
    search(tmp_path, Embedding(), demonstrations=DEMONSTRATIONS[:2])
    embedding = Embedding()
    trials, _ = search(tmp_path, embedding, demonstrations=DEMONSTRATIONS[1:])
    assert embedding.templates == [
        demonstration.before(PROMPTEOL) for demonstration in DEMONSTRATIONS[2:]
    ]
    assert {trial.demonstration for trial in trials} == {None, *DEMONSTRATIONS[1:]}


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("length", [0, 1, 20])
@pytest.mark.parametrize("line", [0, 1, 4])
def test_a_last_line_that_was_cut_off(tmp_path: Path, line: int, length: int) -> None:
    whole, _ = search(tmp_path, Embedding())
    path = tmp_path / "trials.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    path.write_bytes(b"".join(lines[:line]) + lines[line][:length])
    embedding = Embedding()
    trials, _ = search(tmp_path, embedding)
    assert trials == whole
    assert len(embedding.templates) == 6 - max(line - 1, 0)
    assert path.read_bytes().splitlines(keepends=True) == lines


@pytest.mark.usefixtures("few_resamples")
def test_without_the_cosines_of_the_plain_template_it_is_scored_again(tmp_path: Path) -> None:
    whole, _ = search(tmp_path, Embedding(), demonstrations=DEMONSTRATIONS[:3])
    (tmp_path / "plain.npy").unlink()
    embedding = Embedding()
    trials, _ = search(tmp_path, embedding, demonstrations=DEMONSTRATIONS[:4])
    assert embedding.templates == [PROMPTEOL, DEMONSTRATIONS[3].before(PROMPTEOL)]
    assert [trial for trial in trials if trial.demonstration != DEMONSTRATIONS[3]] == whole


def reordered(data: bytes) -> bytes:
    return data[:-16] + data[-8:] + data[-16:-8]


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "does not hold 80 cosines"),
        (lambda data: b"\0" * len(data), "does not hold 80 cosines"),
        (lambda data: data[:-1], "does not hold 80 cosines"),
        (lambda data: data.replace(b"{", b"[", 1), "does not hold 80 cosines"),
        (lambda data: b"PK\3\4" + data[4:], "does not hold 80 cosines"),
        (reordered, "its cosines are not those that were scored"),
        (lambda data: data[:-8] + b"\xff" * 8, "its cosines are not those that were scored"),
    ],
    ids=["empty", "zeros", "cut off", "header", "zip", "other order", "not a number"],
)
def test_damaged_cosines_of_the_plain_template_are_scored_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    whole, _ = search(tmp_path, Embedding(), demonstrations=DEMONSTRATIONS[:3])
    plain = tmp_path / "plain.npy"
    good = plain.read_bytes()
    assert np.load(plain).shape == (80,)
    bad = damage(good)
    assert bad != good
    plain.write_bytes(bad)
    embedding = Embedding()
    trials, listener = search(tmp_path, embedding, demonstrations=DEMONSTRATIONS[:4])
    assert embedding.templates == [PROMPTEOL, DEMONSTRATIONS[3].before(PROMPTEOL)]
    assert [trial for trial in trials if trial.demonstration != DEMONSTRATIONS[3]] == whole
    assert listener.said[0].startswith(f"{plain}: ")
    assert reason in listener.said[0]
    assert listener.said[0].endswith("; the plain template is scored again")
    assert plain.read_bytes() == good
    again = Embedding()
    search(tmp_path, again, demonstrations=DEMONSTRATIONS[:4])
    assert not again.templates


@pytest.mark.usefixtures("few_resamples")
def test_cosines_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, plain = tmp_path / "plain.npy.partial", tmp_path / "plain.npy"
    sizes = []

    def fsync(number: int) -> None:
        if partial.exists():
            assert not plain.exists()
            sizes.append(os.fstat(number).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    search(tmp_path, Embedding())
    assert sizes == [plain.stat().st_size]
    assert not partial.exists()


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"template": "{text} means:"}, "template was 'This sentence"),
        ({"identity": IDENTITY | {"model": "b/model"}}, "model was 'a/model' and is now 'b/model'"),
        ({"identity": IDENTITY | icl.set_identity(make_set(70))}, "pairs was None and is now"),
        ({"identity": IDENTITY | {"clean_up": True}}, "clean_up was None and is now True"),
    ],
    ids=["template", "model", "set", "new key"],
)
def test_another_search_is_refused(tmp_path: Path, other: Any, message: str) -> None:
    search(tmp_path, Embedding())
    content = (tmp_path / "trials.jsonl").read_bytes()
    embedding = Embedding()
    with pytest.raises(ValueError, match=f"is of another search: {message}.*another `out`"):
        search(tmp_path, embedding, **other)
    assert not embedding.templates
    assert (tmp_path / "trials.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"a file of mine",
        b"a file\nof mine",
        b"{}\n",
        b"[1]\n",
        b'{"search": 3}\n',
        b'{"search": {}}\nx\n',
        b'{"search": {}}\n{"score": 1}\n{"cut',
        b"\xff\n",
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"trials.jsonl is no file of a search.*another `out`"):
        search(tmp_path, Embedding())
    assert path.read_bytes() == content


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match=r"`out`: .*out is a file"):
        search(tmp_path / "out", Embedding())


def test_sampled_pairs() -> None:
    some = sampled(SET, 20)
    assert some.pairs == sampled(SET, 20).pairs
    places = [SET.pairs.index(pair) for pair in some.pairs]
    assert len(set(places)) == 20
    assert places == sorted(places) != list(range(20))
    assert sampled(SET, None) is sampled(SET, 80) is SET
    assert icl.set_identity(some) != icl.set_identity(SET)


# --- the command ------------------------------------------------------------------------------

OWN = "sentence\tword\n" + "".join(
    f"{text}\t{word}\n"
    for text, word in (
        ("the cat sat on the mat .", "cat"),
        ("a dog ran in the rain", "rain"),
        ("the man is [not] happy", "sad"),
    )
)


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.tsv"
    own.write_text(OWN)
    return [
        "icl-search",
        str(tiny_folder),
        *("--demonstrations", str(own), "-s", "demo", "--limit", "30", "--offline"),
        *("--template", 'the sun is "{text}" not "', "--set", "model.dtype=fp32"),
    ]


def test_search_from_the_command_line(
    command: Run,
    arguments: list[str],
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    code, out, err = command(*arguments, "--top", "2")
    assert code == 0, err
    folder = tmp_path / "icl" / tiny_folder.name
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    header, trials = lines[0]["search"], lines[1:]
    assert len(trials) == 4
    assert (header["pairs"], header["set"], header["dtype"]) == (30, "demo", "float32")
    assert header["pooling"] == "last"
    assert header["append_eos"] is False
    rows = re.findall(r"│ +(\d) │ +(-?\d+\.\d\d) │ +-?\d+\.\d\d to -?\d+\.\d\d │", out)
    best = sorted(trials, key=lambda trial: -trial["spearman"])
    shown = best[:2] + [trial for trial in best[2:] if trial["sentence"] is None]
    assert [(int(n), s) for n, s in rows] == [
        (best.index(trial) + 1, f"{100 * trial['spearman']:.2f}") for trial in shown
    ]
    for place in range(1, 5):
        assert f"{place}/4  " in err
    recipe = yaml.safe_load(out[out.index("text:\n") :])
    winner = best[0]["sentence"]
    template = 'the sun is "{text}" not "'
    if winner is not None:
        filled = template.replace("{text}", winner)
        template = f'{filled}{best[0]["word"]}".{template}'
    assert recipe["text"]["template"] == template
    assert recipe["embedding"]["pooling"] == "last"

    monkeypatch.setattr(
        loading, "embed_texts", lambda *args, **options: pytest.fail("scored again")
    )
    code, again, err = command(*arguments, "--top", "2")
    assert code == 0, err
    assert again == out
    assert "4 of 4 are in " in err


def test_the_recipe_it_prints_scores_the_same(
    command: Run,
    arguments: list[str],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    place = arguments.index("--limit")
    del arguments[place : place + 2]
    code, out, err = command(*arguments)
    assert code == 0, err
    text = yaml.safe_load(out[out.index("text:\n") :])
    text["model"] = {"id": "any", "dtype": "fp32", "quantization": "none"}
    text["data"] = {"sources": [{"path": "demo"}]}
    recipe = tmp_path / "found.yaml"
    recipe.write_text(yaml.safe_dump(text))
    scores = tmp_path / "scores.json"
    code, _, err = command(
        *("eval", str(tiny_folder), "-s", "demo", "--recipe", str(recipe)),
        *("--offline", "--out", str(scores), "--resamples", "5"),
    )
    assert code == 0, err
    lines = (tmp_path / "icl" / tiny_folder.name / "trials.jsonl").read_text().splitlines()
    best = max(json.loads(line)["spearman"] for line in lines[1:])
    assert json.loads(scores.read_text())["sets"][0]["spearman"] == pytest.approx(best, abs=1e-4)


def test_that_a_prefix_is_not_shared_is_said_once(
    command: Run,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def refuse(*args: Any) -> Any:
        asked.append(args)
        raise NotShared("injected")

    monkeypatch.setattr(sharing, "run_prefix", refuse)
    code, _, err = command(*arguments)
    assert code == 0, err
    assert len(asked) >= 3
    assert err.count("injected") == 1


def test_without_a_template_it_is_prompteols(
    command: Run,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = arguments.index("--template")
    del arguments[place : place + 2]
    templates = []

    def embed(*args: Any, text_format: Any, **options: Any) -> Vectors:
        templates.append(text_format)
        return inference.embed_texts(*args, text_format=text_format, **options)

    monkeypatch.setattr(loading, "embed_texts", embed)
    code, _, err = command(*arguments)
    assert code == 0, err
    assert f"template: {PROMPTEOL}" in err
    assert [text_format.template for text_format in templates][:2] == [
        'This sentence : "{text}" means in one word:"',
        'This sentence : "the cat sat on the mat ." means in one word:"cat".'
        'This sentence : "{text}" means in one word:"',
    ]
    assert not any(text_format.append_eos for text_format in templates)


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--template", "no slot"), "--template: got 'no slot', wanted {text} in it exactly once"),
        (("--demonstrations", "nowhere.tsv"), "--demonstrations: no such file"),
        (("-s", "nothing"), "eval set 'nothing': no such file"),
        (("--limit", "29"), "is of another search: pairs was 30 and is now 29"),
        (("--template", "{text} is"), "is of another search: template was"),
        (("--clean-up",), "is of another search: sha256 was"),
        (("--set", "text.max_tokens=9"), "is of another search: max_tokens was"),
    ],
)
def test_mistakes(
    command: Run,
    arguments: list[str],
    change: tuple[str, ...],
    message: str,
) -> None:
    if "another search" in message:
        assert command(*arguments)[0] == 0
    code, out, err = command(*arguments, *change)
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())


def test_other_weights_under_the_same_name_are_refused(
    command: Run,
    arguments: list[str],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    arguments[1] = str(folder)
    assert command(*arguments)[0] == 0
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command(*arguments)
    assert code == 2
    assert "is of another search: weights was" in " ".join(err.split())


def test_a_run_is_searched_as_it_embeds(
    command: Run,
    finished: Path,
    arguments: list[str],
    tmp_path: Path,
) -> None:
    arguments[1] = str(finished)
    own = arguments[: arguments.index("--set")]
    for folder in (finished, finished / "model"):
        for change in (("--set", "embedding.pooling=last"), ("--recipe", "demo")):
            for words in (
                own,
                ["eval", "", "-s", "demo"],
                ["embed", "", str(tmp_path / "own.tsv")],
            ):
                code, out, err = command(words[0], str(folder), *words[2:], *change)
                assert (code, out) == (2, "")
                message = f"{folder} says itself how it embeds; leave out --recipe and --set"
                assert message in " ".join(err.split())

    code, out, err = command(*own)
    assert code == 0, err
    (path,) = tmp_path.glob("icl/*/trials.jsonl")
    header = json.loads(path.read_text().splitlines()[0])["search"]
    assert (header["pooling"], header["append_eos"], header["lora_scaling"]) == ("eos", True, 4.0)
    assert f"{finished} is always evaluated under the template it was trained with." in out
    assert "train a recipe with these lines:\ntext:\n" in out
    recipe = yaml.safe_load(out[out.index("text:\n") :])
    assert recipe["text"]["template"].endswith('the sun is "{text}" not "')
    text, embedding = recipe["text"], recipe["embedding"]
    assert (text["append_eos"], text["max_tokens"], embedding["pooling"]) == (True, 16, "eos")


def test_advice(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(str(tiny_folder), torch.device("cpu"), print)
    base = icl.SearchedModel(str(tiny_folder), loaded, PROMPTEOL)
    assert (
        base.advice(PROMPTEOL)
        == "Lines of a recipe; with a data section it is one to train, and one for "
        f"`lowmem-cft eval {tiny_folder} --recipe RECIPE`:"
    )
    (tmp_path / RECORD).write_text("{}")
    own = icl.SearchedModel(str(tmp_path), loaded, "{text}")
    assert own.advice("{text}") == f"{tmp_path} embeds so as it is:"
    assert "To use this one, train a recipe with these lines:" in own.advice(PROMPTEOL)
