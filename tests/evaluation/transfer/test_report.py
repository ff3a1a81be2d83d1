"""Transfer tasks as one report, and `eval --suite transfer` as a user meets it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowmem_cft.evaluation.clean_up import clean_up
from lowmem_cft.evaluation.sts.compare import find_reports
from lowmem_cft.evaluation.transfer import report as transfer_report
from lowmem_cft.evaluation.transfer import tasks as transfer_data
from lowmem_cft.evaluation.transfer.score import CONVERGED, SENTEVAL, TransferSettings
from lowmem_cft.evaluation.transfer.tasks import TaskSpec
from lowmem_cft.inference.embed import Vectors
from made_sets import Lookup, make_task
from running import MEAN, Run
from tiny import WORDS

SMALL = replace(CONVERGED, folds=3, penalties=(1e-3, 1e-1))


def score_tasks(*arguments: Any, **options: Any) -> transfer_report.TransferReport:
    """The whole report, which is the last one."""
    *_, report = transfer_report.partial_reports(*arguments, **options)
    return report


# --- the report -------------------------------------------------------------------------------


def small_report(
    *,
    settings: TransferSettings = SMALL,
    num_tasks: int = 2,
    limit: int | None = None,
    scale: float = 1,
) -> transfer_report.TransferReport:
    tasks = [replace(make_task({"all": 60 + i}), limit=limit) for i in range(num_tasks)]
    looks = [Lookup(task) for task in tasks]
    sizes = {len(task.splits["all"].texts): look for task, look in zip(tasks, looks, strict=True)}
    embed = lambda texts: scale * sizes[len(texts)](texts)
    return score_tasks(tasks, embed, model="m", settings=settings)


def test_a_report_is_its_scores_and_their_mean(tmp_path: Path) -> None:
    report = small_report()
    first, second = report.scores
    assert first.accuracy != second.accuracy
    assert report.mean == pytest.approx((first.accuracy + second.accuracy) / 2, abs=1e-12)
    report.write(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["mean"] == report.mean
    assert values["mean_dev"] == pytest.approx((first.dev_accuracy + second.dev_accuracy) / 2)
    assert [task["accuracy"] for task in values["tasks"]] == [first.accuracy, second.accuracy]
    assert values["tasks"][0]["protocol"] == first.protocol
    assert values["tasks"][0]["checksums"] == {"made.tsv": "0" * 64}
    assert (values["solver"], values["complete"]) == ("converged", False)
    assert values["versions"]["torch"]


def test_lengths_of_embeddings_are_measured() -> None:
    task = make_task({"all": 60})
    embed = Lookup(task)
    norms = np.linalg.norm(embed(task.splits["all"].texts), axis=1)
    report = score_tasks([task], embed, model="m", settings=SMALL)
    assert report.lengths[0].low == pytest.approx(norms.min(), rel=1e-6)
    assert report.lengths[0].high == pytest.approx(norms.max(), rel=1e-6)
    assert report.embeddings == f"not normalised, of length {norms.min():.3g} to {norms.max():.3g}"

    def normalised(texts: Sequence[str]) -> Vectors:
        emb = embed(texts)
        unit: Vectors = emb / np.linalg.norm(emb, axis=1, keepdims=True)
        return unit

    report = score_tasks([task], normalised, model="m", settings=SMALL)
    assert report.embeddings.startswith("of length 1")


def test_clean_up_reaches_every_text() -> None:
    task = make_task({"train": 40, "test": 30}, pairs=True)
    embed, seen = Lookup(task), []

    def knows_cleaned(texts: Sequence[str]) -> Vectors:
        seen.extend(texts)
        return embed([text.removesuffix(".") for text in texts])

    cleaned = score_tasks([task], knows_cleaned, model="m", settings=SMALL, cleaned_up=True)
    assert sorted(seen) == sorted(clean_up(text) for text in embed.vector)
    assert all(text.endswith(".") for text in seen)
    plain = score_tasks([task], embed, model="m", settings=SMALL)
    assert cleaned.scores == plain.scores
    assert cleaned.file_name == "eval-transfer-partial-made-converged-clean-up.json"


def test_names_of_files_tell_reports_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    report = small_report()
    assert report.file_name == "eval-transfer-partial-made-made-converged.json"
    assert small_report(num_tasks=1).file_name == "eval-transfer-partial-made-converged.json"
    monkeypatch.setattr(transfer_data, "SPECS", {"one": 1, "two": 2})
    assert report.complete
    assert report.file_name == "eval-transfer-converged.json"
    assert replace(report, settings=SENTEVAL).file_name == "eval-transfer.json"
    cut = small_report(limit=60)
    assert not cut.complete
    assert cut.file_name == "eval-transfer-limit-60-converged.json"
    assert replace(report, float32=True).file_name == "eval-transfer-converged-float32.json"


def test_after_each_task_there_is_the_report_so_far() -> None:
    tasks = [make_task({"all": 60 + i}) for i in range(3)]
    looks = [Lookup(task) for task in tasks]
    sizes = {len(look.vector): look for look in looks}
    assert len(sizes) == 3
    embed = lambda texts: sizes[len(texts)](texts)
    reports = list(transfer_report.partial_reports(tasks, embed, model="m", settings=SMALL))
    assert [len(report.scores) for report in reports] == [1, 2, 3]
    for report in reports:
        assert report.scores == reports[-1].scores[: len(report.scores)]
        assert len(report.lengths) == len(report.scores)


def test_a_task_too_small_is_refused_before_any_is_embedded() -> None:
    good, bad = make_task({"all": 60}), make_task({"all": 4})
    embed = Lookup(good)
    with pytest.raises(ValueError, match=r"made: .*Take more rows: a greater limit, or none"):
        score_tasks([good, bad], embed, model="m", settings=SMALL)
    assert embed.calls == []


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def tasks_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small tasks under real names: rows of a class have words of their own."""
    specs = (
        TaskSpec("CR", {"all": 90}),
        TaskSpec("TREC", {"train": 80, "test": 40}, classes=("ABBR", "DESC", "HUM")),
        TaskSpec("MRPC", {"train": 70, "test": 40}, pairs=True),
    )
    monkeypatch.setattr(transfer_data, "SPECS", {spec.name: spec for spec in specs})
    folder = tmp_path / "data"
    draw = np.random.default_rng(0)
    text = lambda words: " ".join(draw.choice(words, int(draw.integers(3, 9))))
    for spec in specs:
        for split, count in spec.splits.items():
            lines = ["\t".join(spec.columns)]
            for i in range(count):
                k = i % len(spec.classes)
                first = text(WORDS[10 * k : 10 * k + 14])
                other = text(WORDS[:12] if k else WORDS[20:])
                lines.append("\t".join([spec.classes[k], first, other][: len(spec.columns)]))
            file = folder / spec.file(split)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("LOWMEM_CFT_DATA", str(folder))
    return folder


def flat(text: str) -> str:
    return re.sub(r"[│\s]+", " ", text)


@pytest.mark.usefixtures("tasks_at_hand")
def test_all_tasks(command: Run, tiny_folder: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "scores.json"
    code, out, err = command(
        "eval", str(tiny_folder), "--suite", "transfer", *MEAN, "--solver", "converged",
        "--out", str(out_file),
    )  # fmt: skip
    assert code == 0, err
    values = json.loads(out_file.read_text())
    assert values["complete"] is True
    assert [task["name"] for task in values["tasks"]] == ["CR", "TREC", "MRPC"]
    assert not any(task["unconverged"] for task in values["tasks"])
    shown = flat(out)
    for task in values["tasks"]:
        accuracy, dev = (f"{100 * task[key]:.2f}" for key in ("accuracy", "dev_accuracy"))
        assert 0.4 < task["accuracy"] <= 1
        assert f"{task['name']} {accuracy} {dev} " in shown
        assert f"{task['name']}: {accuracy}\n" in err
        for checksum in task["checksums"].values():
            assert checksum[:12] in out
        low, high = task["embedding_length"]["low"], task["embedding_length"]["high"]
        assert low < high, "raw hidden states"
        assert abs(low - 1) > 0.01
    assert f"mean {100 * values['mean']:.2f} {100 * values['mean_dev']:.2f}" in shown
    assert "80 train" in out
    assert "40 test" in out
    assert "CR: SentEval's splits (nested 10-fold)" in shown
    assert "solved to convergence (not SentEval's Adam)" in shown
    assert "embeddings: not normalised" in shown
    assert "*" not in out


@pytest.mark.usefixtures("tasks_at_hand")
def test_fewer_tasks_and_rows_are_marked_in_a_runs_folder(command: Run, finished: Path) -> None:
    few = ("--suite", "transfer", "-s", "TREC", "-s", "MRPC", "--limit", "60", "--clean-up")
    code, out, err = command("eval", str(finished), *few)
    assert code == 0, err
    name = "eval-transfer-partial-MRPC-TREC-limit-60-clean-up.json"
    assert f"written: {finished / name}" in out.replace("\n", "")
    values = json.loads((finished / name).read_text())
    assert (values["limit"], values["complete"], values["solver"]) == (60, False, "senteval")
    shown = flat(out)
    assert "60 of 80 train" in shown
    assert "40 test" in shown
    assert "TREC* " in shown
    assert "mean of 2 of 3* " in shown
    assert "*: 60 rows a split at most; not the protocol's figure" in shown
    assert "PromptEOL text clean-up" in shown
    shutil.copy(finished / name, finished / "eval-transfer.json")
    with pytest.raises(ValueError, match="holds no report of STS sets"):
        find_reports(finished, finished)
    code, _, err = command("compare", str(finished / name), str(finished / name))
    assert code == 2
    assert "a report of transfer tasks" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--suite", "transfer", "--protocol", "senteval"], "--protocol belongs to --suite sts"),
        (["--suite", "transfer", "--resamples", "9"], "--resamples belongs to --suite sts"),
        (["--suite", "transfer", "--mteb-out", "m"], "--mteb-out belongs to --suite sts"),
        (["-s", "demo", "--limit", "9"], "--limit belongs to --suite transfer"),
        (["--suite", "sts", "--solver", "senteval"], "--solver belongs to --suite transfer"),
        (["--suite", "transfer", "--solver", "sgd"], "wanted one of senteval, converged"),
        (["--suite", "transfer", "--limit", "0"], "--limit"),
        (["--suite", "transfer", "-s", "STS12"], "'STS12': none of CR, TREC, MRPC"),
        (["--suite", "transfer", "-s", "CR", "-s", "CR"], "CR: named twice"),
        (
            ["--suite", "transfer", "-s", "CR", "--limit", "9"],
            "CR: Cannot have number of splits n_splits=10",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    command: Run,
    tasks_at_hand: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("eval", "any", "--offline", *arguments)
    assert code == 2
    assert named in flat(err)
    assert list(tmp_path.iterdir()) == [tasks_at_hand]


def test_missing_tasks_are_named(
    command: Run,
    tasks_at_hand: Path,
) -> None:
    (tasks_at_hand / "TREC" / "TREC-test.tsv").unlink()
    code, _, err = command("eval", "any", "--suite", "transfer")
    assert code == 2
    assert "lacks TREC/TREC-test.tsv; make them from SentEval's data" in flat(err)
