"""SentEval's protocol against plain loops over scikit-learn, and what a score says of itself."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lowmem_cft.evaluation.transfer.score import (
    CONVERGED,
    SENTEVAL,
    TransferSettings,
    protocol_name,
    score_task,
)
from lowmem_cft.evaluation.transfer.tasks import (
    SPECS,
    load_tasks,
)
from lowmem_cft.inference.embed import Vectors
from made_sets import Lookup, make_task

Labels = npt.NDArray[np.int64]
SMALL = TransferSettings("converged", folds=3, penalties=(1e-4, 1e-2, 1.0))


def plain_accuracy(
    train: tuple[Vectors, Labels], test: tuple[Vectors, Labels], penalty: float
) -> float:
    """scikit-learn's regression; a column of ones is the bias, so that it is penalised too."""
    from sklearn.linear_model import LogisticRegression

    (x_ND, label_N), (test_ND, test_N) = train, test
    two = len(set(label_N.tolist())) == 2
    strength = 1 / (penalty * (0.5 if two else 1.0) * len(x_ND))
    model = LogisticRegression(
        C=strength, fit_intercept=False, solver="newton-cg", tol=1e-9, max_iter=10000
    )
    with_one = lambda x: np.c_[x.astype(np.float64), np.ones(len(x))]
    return float(model.fit(with_one(x_ND), label_N).score(with_one(test_ND), test_N))


def plain_choice(x_ND: Vectors, label_N: Labels, settings: TransferSettings) -> tuple[float, float]:
    """(penalty, its accuracy) by cross-validation."""
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(settings.folds, shuffle=True, random_state=1111)
    means = [
        np.mean(
            [
                plain_accuracy((x_ND[a], label_N[a]), (x_ND[b], label_N[b]), penalty)
                for a, b in folds.split(x_ND, label_N)
            ]
        )
        for penalty in settings.penalties
    ]
    best = int(np.argmax(np.round([100 * mean for mean in means], 2)))
    return settings.penalties[best], float(means[best])


def plain_nested(
    x_ND: Vectors, label_N: Labels, settings: TransferSettings
) -> tuple[float, float, list[float]]:
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(settings.folds, shuffle=True, random_state=1111)
    test, dev, chosen = [], [], []
    for a, b in folds.split(x_ND, label_N):
        penalty, accuracy = plain_choice(x_ND[a], label_N[a], settings)
        test.append(plain_accuracy((x_ND[a], label_N[a]), (x_ND[b], label_N[b]), penalty))
        dev.append(accuracy)
        chosen.append(penalty)
    return float(np.mean(test)), float(np.mean(dev)), chosen


def test_nested_folds() -> None:
    task = make_task({"all": 151})
    embed = Lookup(task)
    score = score_task(task, embed, settings=SMALL)
    split = task.splits["all"]
    test, dev, chosen = plain_nested(embed(split.texts), split.label_N, SMALL)
    assert score.accuracy == pytest.approx(test, abs=1e-12)
    assert score.dev_accuracy == pytest.approx(dev, abs=1e-12)
    assert score.penalties == tuple(chosen)
    assert 0.6 < test < 0.99
    assert test != dev
    assert len(set(chosen)) > 1
    assert score.unconverged == 0
    assert score.num_rows == {"all": 151}


@pytest.mark.parametrize("num_classes", [2, 4])
def test_folds_of_train_then_test(num_classes: int) -> None:
    task = make_task({"train": 160, "test": 90}, num_classes)
    embed = Lookup(task)
    score = score_task(task, embed, settings=SMALL)
    (x_ND, test_ND) = (embed(task.splits[name].texts) for name in ("train", "test"))
    label_N, test_N = task.splits["train"].label_N, task.splits["test"].label_N
    penalty, dev = plain_choice(x_ND, label_N, SMALL)
    wanted = plain_accuracy((x_ND, label_N), (test_ND, test_N), penalty)
    assert score.penalties == (penalty,)
    assert score.dev_accuracy == pytest.approx(dev, abs=1e-12)
    assert score.accuracy == pytest.approx(wanted, abs=1e-12)
    assert 1.5 / num_classes < wanted < 0.99
    others = {plain_accuracy((x_ND, label_N), (test_ND, test_N), p) for p in SMALL.penalties}
    assert len(others) > 1


def test_given_splits() -> None:
    task = make_task({"train": 100, "dev": 80, "test": 90})
    embed = Lookup(task, seed=1)
    score = score_task(task, embed, settings=SMALL)
    data = {name: (embed(part.texts), part.label_N) for name, part in task.splits.items()}
    dev = [plain_accuracy(data["train"], data["dev"], p) for p in SMALL.penalties]
    test = [plain_accuracy(data["train"], data["test"], p) for p in SMALL.penalties]
    best = int(np.argmax(dev))
    assert score.penalties == (SMALL.penalties[best],)
    assert score.dev_accuracy == pytest.approx(dev[best], abs=1e-12)
    assert score.accuracy == pytest.approx(test[best], abs=1e-12)
    assert len(set(dev)) > 1
    assert len(set(test)) > 1


def test_pairs_are_compared_by_difference_and_product() -> None:
    task = make_task({"train": 150, "test": 90}, pairs=True)
    embed = Lookup(task, seed=2)
    score = score_task(task, embed, settings=SMALL)

    def compared(name: str) -> Vectors:
        split = task.splits[name]
        u_ND, v_ND = embed(split.texts), embed(split.texts2)
        return np.concatenate([np.abs(u_ND - v_ND), u_ND * v_ND], axis=1)

    label_N, test_N = task.splits["train"].label_N, task.splits["test"].label_N
    penalty, dev = plain_choice(compared("train"), label_N, SMALL)
    wanted = plain_accuracy((compared("train"), label_N), (compared("test"), test_N), penalty)
    assert score.dev_accuracy == pytest.approx(dev, abs=1e-12)
    assert score.accuracy == pytest.approx(wanted, abs=1e-12)
    assert 0.6 < wanted < 0.99


def test_the_solver_is_named_and_each_gives_its_own_result_again() -> None:
    task = make_task({"train": 150, "test": 90})
    embed = Lookup(task, seed=1)
    converged = score_task(task, embed, settings=SMALL)
    trained = score_task(task, embed, settings=replace(SMALL, solver="senteval"))
    assert "solved to convergence (not SentEval's Adam)" in converged.protocol
    assert "by Adam with early stopping as in SentEval" in trained.protocol
    assert converged.dev_accuracy != trained.dev_accuracy
    assert converged == score_task(task, embed, settings=SMALL)
    assert trained == score_task(task, embed, settings=replace(SMALL, solver="senteval"))


def test_all_texts_are_embedded_in_one_call() -> None:
    task = make_task({"train": 40, "test": 30}, pairs=True)
    embed = Lookup(task)
    score_task(task, embed, settings=SMALL)
    (texts,) = embed.calls
    assert sorted(texts) == sorted(embed.vector)


def test_a_score_says_what_it_is() -> None:
    task = replace(make_task({"all": 60}), limit=60)
    score = score_task(task, Lookup(task), settings=SMALL)
    assert score.checksums == {"made.tsv": "0" * 64}
    assert score.protocol == protocol_name(task, SMALL)
    assert score.protocol.startswith("SentEval's splits (nested 3-fold), logistic regression")
    assert score.protocol.endswith("L2 from 0.0001, 0.01, 1, seed 1111; cut to 60 rows a split")
    assert score.task_rows == {"all": 60}
    assert set(score.penalties) <= set(SMALL.penalties)


def test_the_defaults_are_sentevals() -> None:
    assert SENTEVAL.solver == "senteval"
    assert SENTEVAL.folds == 10
    assert SENTEVAL.penalties == (1e-5, 1e-4, 1e-3, 1e-2)
    assert SENTEVAL.seed == SENTEVAL.adam.seed == 1111
    adam = SENTEVAL.adam
    assert (adam.batch_size, adam.tenacity, adam.epoch_size, adam.max_epoch) == (64, 5, 4, 200)


@pytest.mark.parametrize(
    ("embed", "message"),
    [
        (lambda texts: np.zeros((len(texts) - 1, 4)), r"made: got .* \(59, 4\), wanted \(60, D\)"),
        (lambda texts: np.zeros(len(texts)), r"made: got embeddings of shape \(60,\)"),
        (lambda texts: np.full((len(texts), 4), np.nan), "made: 60 of 60 embeddings are not fin"),
    ],
)
def test_bad_embeddings(embed: Callable[[Sequence[str]], Vectors], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_task(make_task({"all": 60}), embed, settings=SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"solver": "sgd"}, "solver: got 'sgd', wanted senteval or converged"),
        ({"folds": 1}, "folds: got 1, wanted at least 2"),
        ({"penalties": ()}, r"penalties: got \(\), wanted some"),
        ({"penalties": (0.0, 1.0)}, "all more than 0"),
        ({"folds": 40}, r"made: n_splits=40 .* Take more rows"),
    ],
)
def test_settings_without_meaning(change: dict[str, object], message: str) -> None:
    task = make_task({"all": 60})
    embed = Lookup(task)
    with pytest.raises(ValueError, match=message):
        score_task(task, embed, settings=replace(SMALL, **change))  # type: ignore[arg-type]
    assert not embed.calls  # which may take an hour


def test_without_scikit_learn_nothing_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given splits draw no folds, so that only the solver needs it."""
    task = make_task({"train": 40, "dev": 30, "test": 30})
    embed = Lookup(task)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"made: .*pip install 'lowmem-cft\[transfer\]'"):
        score_task(task, embed, settings=SMALL)
    assert not embed.calls
    assert score_task(task, embed, settings=replace(SMALL, solver="senteval")).accuracy > 0.5


def bag_of_words(texts: Sequence[str]) -> Vectors:
    """Words hashed into 256 buckets: learns something of every task."""
    vectors = np.zeros((len(texts), 256), dtype=np.float32)
    for row, text in zip(vectors, texts, strict=True):
        for word in text.lower().split():
            row[zlib.crc32(word.encode()) % 256] += 1
    return vectors


@pytest.mark.parametrize("settings", [SENTEVAL, CONVERGED], ids=lambda s: s.solver)
@pytest.mark.parametrize("name", ["CR", "SST2", "TREC"])
def test_real_tasks_are_learnt(data_folder: Path, name: str, settings: TransferSettings) -> None:
    if not (data_folder / name).is_dir():
        pytest.skip(f"{data_folder} does not hold {name}")
    (task,) = load_tasks(data_folder, [name], limit=800)
    score = score_task(task, bag_of_words, settings=replace(settings, folds=4))
    last = task.splits[list(task.splits)[-1]]
    most_frequent = np.bincount(last.label_N).max() / len(last.label_N)
    assert most_frequent + 0.03 < score.accuracy < 0.95
    assert score.unconverged == 0
    assert score.num_rows == {split: min(800, n) for split, n in SPECS[name].splits.items()}
    assert score.task_rows == SPECS[name].splits
