"""SentEval's classifier: logistic regression by Adam with early stopping, many fits in lockstep.

Every fit starts from the same seed, so fits of as many rows see the same weights at the start and
the same permutations: they can be trained together, as one batched product per step. What comes
out is what training one after the other gives, but for the rounding of float32 products.

Shape suffixes: N rows, D features, F fits' training sets, R penalties of each, K classes, B rows
of a minibatch, T training rows of a set, V rows of its development set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lowmem_cft.evaluation.transfer.folds import Rows


@dataclass(frozen=True)
class AdamSettings:
    """SentEval's names and values; the learning rate is PyTorch's default for Adam."""

    seed: int = 1111
    batch_size: int = 64
    learning_rate: float = 1e-3
    epoch_size: int = 4
    """Passes over the training rows between two looks at the development set."""
    tenacity: int = 5
    """Looks without a new best that are tolerated, in all and not in a row."""
    max_epoch: int = 200
    validation_split: float = 0.05
    """Share of the training rows that is held out where no development rows are given."""


def train_logistic(
    features_ND: Tensor,
    label_N: Tensor,
    train: Sequence[Rows],
    dev: Sequence[Rows | None],
    penalty_FR: Tensor,
    num_classes: int,
    settings: AdamSettings = AdamSettings(),
) -> Tensor:
    """Weights (F, R, K, D + 1) in float32, bias last, each as good as it was on its dev rows.

    Minimises the mean cross-entropy of minibatches; the penalty is added to the gradient as
    penalty * parameter, bias included (PyTorch's `weight_decay`).

    Args:
        features_ND: float32.
        label_N: int64 class numbers.
        train: the row numbers of each set, in SentEval's order.
        dev: rows that decide when to stop; None holds out some of the training rows.
    """
    weight_FRKE = features_ND.new_empty((*penalty_FR.shape, num_classes, features_ND.shape[1] + 1))
    kinds = [(len(rows), given is None) for rows, given in zip(train, dev, strict=True)]
    for kind in sorted(set(kinds)):
        of_kind = [i for i in range(len(train)) if kinds[i] == kind]
        num_rows, hold_out = kind
        draw = np.random.RandomState(settings.seed)
        order_T = draw.permutation(num_rows) if hold_out else np.arange(num_rows)
        num_dev = int(settings.validation_split * num_rows) if hold_out else 0
        together = _Lockstep(
            features_ND,
            label_N,
            np.stack([train[i][order_T[num_dev:]] for i in of_kind]),
            [_dev_rows(train[i], dev[i], order_T[:num_dev]) for i in of_kind],
            penalty_FR[of_kind],
            num_classes,
            settings,
        )
        weight_FRKE[of_kind] = together.train(draw)
    return weight_FRKE


def _dev_rows(train: Rows, given: Rows | None, held_out: Rows) -> Rows:
    rows = train[held_out] if given is None else given
    if not len(rows):
        raise ValueError(f"got {len(train)} rows to train on, too few to stop early on some")
    return rows


class _Lockstep:
    """Fits of as many training rows each, trained with the same permutations."""

    def __init__(
        self,
        features_ND: Tensor,
        label_N: Tensor,
        train_FT: Rows,
        dev: list[Rows],
        penalty_FR: Tensor,
        num_classes: int,
        settings: AdamSettings,
    ) -> None:
        device, num_features = features_ND.device, features_ND.shape[1]
        num_sets, num_penalties = penalty_FR.shape
        self._features_ND, self._label_N, self._settings = features_ND, label_N, settings
        self._shape = (num_penalties, num_classes)
        self._train_FT = torch.from_numpy(train_FT).to(device)
        self._dev = [torch.from_numpy(rows).to(device) for rows in dev]
        # one column per penalty and class
        self._decay_F1C = (
            penalty_FR.to(features_ND).repeat_interleave(num_classes, dim=1).unsqueeze(1)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            first = nn.Linear(num_features, num_classes)
        weight_DC = first.weight.detach().to(features_ND).T.repeat(1, num_penalties)
        bias_1C = first.bias.detach().to(features_ND).repeat(1, num_penalties)
        self._weight_FDC = nn.Parameter(weight_DC.repeat(num_sets, 1, 1))
        self._bias_F1C = nn.Parameter(bias_1C.repeat(num_sets, 1, 1))
        self._adam = torch.optim.Adam([self._weight_FDC, self._bias_F1C], lr=settings.learning_rate)

    @torch.no_grad()
    def train(self, draw: np.random.RandomState) -> Tensor:
        """The best weights of each fit, (F, R, K, E)."""
        settings, num_penalties = self._settings, self._shape[0]
        set_F = torch.arange(len(self._train_FT), device=self._features_ND.device)
        best_FRKE = self._weights()
        most_FR = torch.full((len(set_F), num_penalties), -1, device=set_F.device)
        failures_FR, stopped_FR = torch.zeros_like(most_FR), most_FR >= 0
        epoch = 0
        while len(set_F) and epoch <= settings.max_epoch:
            for _ in range(settings.epoch_size):
                self._pass(draw.permutation(self._train_FT.shape[1]))
            epoch += settings.epoch_size
            correct_FR = self._num_correct()
            better_FR = (correct_FR > most_FR[set_F]) & ~stopped_FR[set_F]
            best_FRKE[set_F] = torch.where(
                better_FR[..., None, None], self._weights(), best_FRKE[set_F]
            )
            most_FR[set_F] = torch.where(better_FR, correct_FR, most_FR[set_F])
            stopped_FR[set_F] |= ~better_FR & (failures_FR[set_F] >= settings.tenacity)
            failures_FR[set_F] += (~better_FR).long()
            going_F = ~stopped_FR[set_F].all(dim=1)
            if not bool(going_F.all()):
                set_F = set_F[going_F]
                self._keep(going_F)
        return best_FRKE

    def _weights(self) -> Tensor:
        weight_FEC = torch.cat([self._weight_FDC.data, self._bias_F1C.data], dim=1)
        num_sets, size, _ = weight_FEC.shape
        return weight_FEC.view(num_sets, size, *self._shape).permute(0, 2, 3, 1).contiguous()

    def _pass(self, order_T: Rows) -> None:
        """Once over the training rows."""
        for row_B in torch.split(torch.from_numpy(order_T), self._settings.batch_size):
            row_FB = self._train_FT[:, row_B.to(self._train_FT.device)]
            x_FBD = self._features_ND[row_FB]
            logit_FBC = torch.baddbmm(self._bias_F1C, x_FBD, self._weight_FDC)
            error_FBRK = logit_FBC.view(*row_FB.shape, *self._shape).softmax(dim=3)
            own_FB11 = self._label_N[row_FB][:, :, None, None]
            own_FBR1 = own_FB11.expand(-1, -1, self._shape[0], 1)
            error_FBRK.scatter_add_(3, own_FBR1, -torch.ones_like(error_FBRK[..., :1]))
            error_FBC = error_FBRK.flatten(2) / len(row_B)
            self._weight_FDC.grad = self._decay_F1C * self._weight_FDC
            self._weight_FDC.grad.baddbmm_(x_FBD.transpose(1, 2), error_FBC)
            self._bias_F1C.grad = self._decay_F1C * self._bias_F1C
            self._bias_F1C.grad += error_FBC.sum(dim=1, keepdim=True)
            self._adam.step()

    def _num_correct(self) -> Tensor:
        """Rows of each development set that are classified right, int64 (F, R)."""
        correct = []
        for i, row_V in enumerate(self._dev):
            logit_VC = torch.addmm(self._bias_F1C[i], self._features_ND[row_V], self._weight_FDC[i])
            class_VR = logit_VC.view(-1, *self._shape).argmax(dim=2)
            correct.append((class_VR == self._label_N[row_V, None]).sum(dim=0))
        return torch.stack(correct)

    def _keep(self, keep_F: Tensor) -> None:
        """Drop the sets of which every fit has stopped, from the optimizer's state too."""
        for parameter in (self._weight_FDC, self._bias_F1C):
            state = self._adam.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name][keep_F]
            parameter.data = parameter.data[keep_F]
            parameter.grad = None
        self._train_FT, self._decay_F1C = self._train_FT[keep_F], self._decay_F1C[keep_F]
        self._dev = [rows for rows, keep in zip(self._dev, keep_F.tolist(), strict=True) if keep]
