"""Fits in lockstep against training them one after the other."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from lowmem_cft.evaluation.transfer.score import TransferSettings, score_task
from lowmem_cft.evaluation.transfer.senteval_adam import AdamSettings, train_logistic
from lowmem_cft.evaluation.transfer.tasks import Split, TaskSpec, TransferTask

Rows = npt.NDArray[np.int64]
SETTINGS = AdamSettings(learning_rate=0.01, batch_size=16, epoch_size=2, tenacity=3, max_epoch=40)
PENALTIES = (1e-4, 3e-1)


@dataclass
class Plain:
    weight_KE: Tensor
    looks: int
    best_look: int


def train_plainly(
    features_ND: Tensor,
    label_N: Tensor,
    rows: Rows,
    dev: Rows | None,
    penalty: float,
    num_classes: int,
    settings: AdamSettings,
) -> Plain:
    """One classifier, in the order in which SentEval's description puts things."""
    torch.manual_seed(settings.seed)
    draw = np.random.RandomState(settings.seed)
    layer = nn.Linear(features_ND.shape[1], num_classes).to(features_ND.dtype)
    adam = torch.optim.Adam(layer.parameters(), lr=settings.learning_rate, weight_decay=penalty)
    if dev is None:
        order = draw.permutation(len(rows))
        held_out = int(settings.validation_split * len(rows))
        rows, dev = rows[order[held_out:]], rows[order[:held_out]]
    x, y = features_ND[rows], label_N[rows]
    best, best_fit, misses, looks, epoch = -1.0, Plain(torch.empty(0), 0, 0), 0, 0, 0
    while epoch <= settings.max_epoch:
        for _ in range(settings.epoch_size):
            order = draw.permutation(len(rows))
            for start in range(0, len(rows), settings.batch_size):
                batch = torch.from_numpy(order[start : start + settings.batch_size])
                adam.zero_grad()
                nn.functional.cross_entropy(layer(x[batch]), y[batch]).backward()
                adam.step()
        epoch += settings.epoch_size
        looks += 1
        with torch.no_grad():
            accuracy = (layer(features_ND[dev]).argmax(dim=1) == label_N[dev]).double().mean()
        if accuracy > best:
            best = float(accuracy)
            now = copy.deepcopy(layer)
            weight_KE = torch.cat([now.weight.detach(), now.bias.detach()[:, None]], dim=1)
            best_fit = Plain(weight_KE, 0, looks)
        else:
            misses += 1
            if misses > settings.tenacity:
                break
    best_fit.looks = looks
    return best_fit


def make(num_classes: int) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(num_classes)
    label_N = draw.integers(0, num_classes, 150)
    centre_KD = draw.normal(size=(num_classes, 5))
    features_ND = centre_KD[label_N] + draw.normal(size=(150, 5))
    return torch.tensor(features_ND), torch.tensor(label_N)


def make_sets() -> tuple[list[Rows], list[Rows | None]]:
    """Two of one size, one of another, and one that holds rows out itself."""
    order = np.random.default_rng(3).permutation(150)
    train = [order[50:], np.roll(order, 50)[50:], order[61:], order]
    return train, [order[:50], np.roll(order, 50)[:50], order[:61], None]


@pytest.mark.parametrize("num_classes", [2, 4])
def test_equals_training_one_after_the_other(num_classes: int) -> None:
    features_ND, label_N = make(num_classes)
    train, dev = make_sets()
    state = torch.get_rng_state()
    got_FRKE = train_logistic(
        features_ND,
        label_N,
        train,
        dev,
        torch.tensor([PENALTIES] * 4, dtype=torch.float64),
        num_classes,
        SETTINGS,
    )
    assert torch.equal(torch.get_rng_state(), state)
    looks, best_looks = set(), set()
    for f in range(4):
        for r, penalty in enumerate(PENALTIES):
            plain = train_plainly(
                features_ND, label_N, train[f], dev[f], penalty, num_classes, SETTINGS
            )
            np.testing.assert_allclose(got_FRKE[f, r], plain.weight_KE, rtol=1e-9, atol=1e-9)
            assert plain.weight_KE.abs().max() > 0.1
            looks.add(plain.looks)
            best_looks.add(plain.looks - plain.best_look)
    # or early stopping, dropping the stopped and keeping the best were not tried
    assert len(looks) > 2
    assert min(looks) < 1 + SETTINGS.max_epoch // SETTINGS.epoch_size
    assert max(best_looks) > 1
    assert not torch.allclose(got_FRKE[:, 0], got_FRKE[:, 1], rtol=0.1)


def test_stops_at_the_last_epoch() -> None:
    features_ND, label_N = make(2)
    train, dev = make_sets()
    patient = AdamSettings(batch_size=16, epoch_size=2, tenacity=100, max_epoch=6)
    got_FRKE = train_logistic(
        features_ND,
        label_N,
        train[:1],
        dev[:1],
        torch.tensor([PENALTIES], dtype=torch.float64),
        2,
        patient,
    )
    plain = train_plainly(features_ND, label_N, train[0], dev[0], PENALTIES[0], 2, patient)
    assert plain.looks == 4  # one more than 6 / 2, as in SentEval
    np.testing.assert_allclose(got_FRKE[0, 0], plain.weight_KE, rtol=1e-9, atol=1e-9)


def test_too_few_rows_to_hold_any_out() -> None:
    features_ND, label_N = make(2)
    with pytest.raises(ValueError, match="got 19 rows to train on, too few to stop early"):
        train_logistic(
            features_ND, label_N, [np.arange(19)], [None], torch.tensor([PENALTIES]), 2, SETTINGS
        )


def make_task(sizes: dict[str, int]) -> tuple[TransferTask, Tensor, Tensor]:
    """A task of two classes whose texts are row numbers, and its features and labels."""
    draw = np.random.default_rng(1)
    num_rows = sum(sizes.values())
    label_N = draw.integers(0, 2, num_rows)
    features_ND = (0.6 * label_N[:, None] + draw.normal(size=(num_rows, 6))).astype(np.float32)
    splits, start = {}, 0
    for name, size in sizes.items():
        rows = range(start, start := start + size)
        splits[name] = Split([str(row) for row in rows], [], label_N[rows])
    task = TransferTask(TaskSpec("made", sizes), splits, {})
    return task, torch.from_numpy(features_ND), torch.from_numpy(label_N)


@dataclass
class PlainBench:
    """The protocol by one classifier at a time."""

    features_ND: Tensor
    label_N: Tensor
    settings: TransferSettings

    def accuracy(self, rows: Rows, dev: Rows | None, test: Rows, penalty: float) -> float:
        adam = self.settings.adam
        plain = train_plainly(self.features_ND, self.label_N, rows, dev, penalty, 2, adam)
        weight_KE = plain.weight_KE
        logit_NK = self.features_ND[test] @ weight_KE[:, :-1].T + weight_KE[:, -1]
        return float((logit_NK.argmax(dim=1) == self.label_N[test]).double().mean())

    def folds(self, rows: Rows) -> list[tuple[Rows, Rows]]:
        from sklearn.model_selection import StratifiedKFold

        folds = StratifiedKFold(self.settings.folds, shuffle=True, random_state=1111)
        return [(rows[a], rows[b]) for a, b in folds.split(rows, self.label_N[rows])]

    def choice(self, pairs: list[tuple[Rows, Rows]]) -> tuple[float, float]:
        """(penalty, accuracy) that is best on the second of each pair, which also stops early."""
        means = [
            float(np.mean([self.accuracy(a, b, b, penalty) for a, b in pairs]))
            for penalty in self.settings.penalties
        ]
        best = int(np.argmax(np.round([100 * mean for mean in means], 2)))
        return self.settings.penalties[best], means[best]


PROTOCOL = TransferSettings(
    folds=3, penalties=(1e-4, 3e-1), adam=AdamSettings(learning_rate=0.01, max_epoch=30)
)


def test_nested_folds_one_after_the_other() -> None:
    task, features_ND, label_N = make_task({"all": 152})
    score = score_task(task, lambda texts: features_ND.numpy(), settings=PROTOCOL)
    plain = PlainBench(features_ND, label_N, PROTOCOL)
    test, dev, chosen = [], [], []
    for rest, fold in plain.folds(np.arange(152)):
        penalty, accuracy = plain.choice(plain.folds(rest))
        test.append(plain.accuracy(rest, None, fold, penalty))
        dev.append(accuracy)
        chosen.append(penalty)
    assert score.accuracy == pytest.approx(np.mean(test), abs=1e-12)
    assert score.dev_accuracy == pytest.approx(np.mean(dev), abs=1e-12)
    assert score.penalties == tuple(chosen)
    assert 0.6 < score.accuracy < 0.95


def test_folds_then_test_one_after_the_other() -> None:
    task, features_ND, label_N = make_task({"train": 121, "test": 70})
    score = score_task(task, lambda texts: features_ND.numpy(), settings=PROTOCOL)
    plain = PlainBench(features_ND, label_N, PROTOCOL)
    train, test = np.arange(121), np.arange(121, 191)
    penalty, dev = plain.choice(plain.folds(train))
    assert score.penalties == (penalty,)
    assert score.dev_accuracy == pytest.approx(dev, abs=1e-12)
    assert score.accuracy == pytest.approx(plain.accuracy(train, None, test, penalty), abs=1e-12)
    assert 0.6 < score.accuracy < 0.95


def test_given_splits_one_after_the_other() -> None:
    task, features_ND, label_N = make_task({"train": 121, "dev": 60, "test": 70})
    score = score_task(task, lambda texts: features_ND.numpy(), settings=PROTOCOL)
    plain = PlainBench(features_ND, label_N, PROTOCOL)
    train, dev, test = np.arange(121), np.arange(121, 181), np.arange(181, 251)
    penalty, accuracy = plain.choice([(train, dev)])
    assert score.penalties == (penalty,)
    assert score.dev_accuracy == pytest.approx(accuracy, abs=1e-12)
    assert score.accuracy == pytest.approx(plain.accuracy(train, dev, test, penalty), abs=1e-12)
    assert 0.6 < score.accuracy < 0.95
