"""Transfer tasks by SentEval's protocol: a logistic regression on frozen embeddings, its accuracy.

Which rows train, choose the L2 penalty and test is SentEval's; how the regression is solved is a
choice (`TransferSettings.solver`), named in every result. docs/transfer.md has the details.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_cft.evaluation.transfer.converged import solve_logistic
from lowmem_cft.evaluation.transfer.folds import FitPlan, Rows, check_scikit_learn, plan_fits
from lowmem_cft.evaluation.transfer.senteval_adam import AdamSettings, train_logistic
from lowmem_cft.evaluation.transfer.tasks import TransferTask
from lowmem_cft.inference.embed import Embed


@dataclass(frozen=True)
class TransferSettings:
    """How the classifiers are trained and chosen; the defaults are SentEval's."""

    solver: Literal["senteval", "converged"] = "senteval"
    """`senteval` is Adam with early stopping, as there; `converged` finds the minimum."""
    folds: int = 10
    penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    seed: int = 1111
    adam: AdamSettings = field(default_factory=AdamSettings)
    """For `senteval`; its seed is SentEval's too."""


SENTEVAL = TransferSettings()
"""What published figures were made with."""

CONVERGED = TransferSettings(solver="converged")
"""The same splits and penalties; no early stopping, so nothing depends on an optimizer."""


@dataclass(frozen=True)
class TransferScore:
    """Accuracies are 0 to 1.

    `penalties` has the one chosen, or one per outer fold. `unconverged` counts the fits that were
    cut off before their minimum. `num_rows` is what each split had here, `task_rows` what the
    protocol has: a score of fewer rows is not the protocol's.
    """

    name: str
    accuracy: float
    dev_accuracy: float
    protocol: str
    penalties: tuple[float, ...]
    num_rows: dict[str, int]
    task_rows: dict[str, int]
    checksums: dict[str, str]
    unconverged: int


def protocol_name(task: TransferTask, settings: TransferSettings) -> str:
    """One line that says how a score came about."""
    k = settings.folds
    scheme = {
        ("all",): f"nested {k}-fold",
        ("train", "test"): f"{k}-fold on train, then test",
        ("train", "dev", "test"): "train, dev, test",
    }[tuple(task.splits)]
    solver = {
        "converged": "solved to convergence (not SentEval's Adam)",
        "senteval": "by Adam with early stopping as in SentEval",
    }[settings.solver]
    grid = ", ".join(f"{penalty:g}" for penalty in settings.penalties)
    cut = "" if task.limit is None else f"; cut to {task.limit} rows a split"
    return (
        f"SentEval's splits ({scheme}), logistic regression {solver}, "
        f"L2 from {grid}, seed {settings.seed}{cut}"
    )


def score_task(
    task: TransferTask,
    embed: Embed,
    *,
    settings: TransferSettings = SENTEVAL,
    device: torch.device | str = "cpu",
) -> TransferScore:
    """Embed a task's texts and score them.

    Args:
        embed: called once. Its vectors are taken as they are: their scale counts, since the
            penalties are absolute.
        device: where the regressions are solved; `converged` solves them on the CPU.

    Raises:
        ValueError: embeddings of a wrong shape or not finite, too few rows for the folds, or
            settings without meaning.
    """
    plan = check_task(task, settings)  # before embedding, so that too few rows cost no time
    labels = {name: split.label_N for name, split in task.splits.items()}
    label_N = torch.from_numpy(np.concatenate(list(labels.values()))).to(device)
    num_classes = len(task.spec.classes)
    bench = _Bench(settings, _features(task, embed).to(device), label_N, num_classes)
    accuracy, dev_accuracy, chosen = bench.score(plan)
    return TransferScore(
        task.name,
        accuracy,
        dev_accuracy,
        protocol_name(task, settings),
        tuple(settings.penalties[i] for i in chosen),
        {name: len(label_N) for name, label_N in labels.items()},
        dict(task.spec.splits),
        dict(task.checksums),
        bench.unconverged,
    )


def check_task(task: TransferTask, settings: TransferSettings) -> FitPlan:
    """The fits that the task takes.

    Raises:
        ValueError: too few rows for the folds, settings without meaning, or no scikit-learn.
    """
    _check(settings)
    labels = {name: split.label_N for name, split in task.splits.items()}
    try:
        if settings.solver == "converged":
            check_scikit_learn()
        return plan_fits(labels, settings.folds, settings.seed)
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from None


def _check(settings: TransferSettings) -> None:
    if settings.solver not in ("converged", "senteval"):
        raise ValueError(f"solver: got {settings.solver!r}, wanted senteval or converged")
    if settings.folds < 2:
        raise ValueError(f"folds: got {settings.folds}, wanted at least 2")
    if not settings.penalties or min(settings.penalties) <= 0:
        raise ValueError(f"penalties: got {settings.penalties}, wanted some, all more than 0")


# --- features -------------------------------------------------------------------------------


def _features(task: TransferTask, embed: Embed) -> Tensor:
    """float32 (N, D), split after split; of pairs (u, v) |u - v| and u * v side by side."""
    texts = [text for split in task.splits.values() for text in split.texts]
    texts += [text for split in task.splits.values() for text in split.texts2]
    emb_PD = np.asarray(embed(texts))
    if emb_PD.ndim != 2 or len(emb_PD) != len(texts) or not emb_PD.shape[1]:
        raise ValueError(
            f"{task.name}: got embeddings of shape {emb_PD.shape}, wanted ({len(texts)}, D)"
        )
    num_bad = int((~np.isfinite(emb_PD).all(axis=1)).sum())
    if num_bad:
        raise ValueError(
            f"{task.name}: {num_bad} of {len(texts)} embeddings are not finite; embed in a wider "
            "dtype"
        )
    vectors_PD = torch.from_numpy(emb_PD.astype(np.float32, copy=False))
    if not task.spec.pairs:
        return vectors_PD
    u_ND, v_ND = vectors_PD.chunk(2)
    return torch.cat([(u_ND - v_ND).abs(), u_ND * v_ND], dim=1)


# --- training and choosing ------------------------------------------------------------------


@dataclass
class _Bench:
    """What every fit of a task shares, and the count of those that did not converge."""

    settings: TransferSettings
    features_ND: Tensor
    label_N: Tensor
    num_classes: int
    unconverged: int = 0

    def score(self, plan: FitPlan) -> tuple[float, float, list[int]]:
        """Accuracy on test, on the rows that chose the penalty, and which were chosen."""
        penalty_R = torch.tensor(self.settings.penalties, dtype=torch.float64)
        weight_FRKE = self._fit(plan.train, plan.dev, penalty_R.repeat(len(plan.train), 1))
        dev_FR = self._accuracy(plan.dev, weight_FRKE)
        # O sets of test rows
        dev_OR = dev_FR.reshape(len(plan.test), -1, len(penalty_R)).mean(axis=1)
        # as SentEval: in percent with two digits, so that near-ties go to the smaller penalty
        chosen = [int(np.argmax(np.round(100 * dev_R, 2))) for dev_R in dev_OR]
        if plan.final is None:
            weight_O1KE = weight_FRKE[:, chosen]
        else:
            weight_O1KE = self._fit(plan.final, [None] * len(chosen), penalty_R[chosen][:, None])
        test_O1 = self._accuracy(plan.test, weight_O1KE)
        best = [dev_R[i] for dev_R, i in zip(dev_OR, chosen, strict=True)]
        return float(test_O1.mean()), float(np.mean(best)), chosen

    def _fit(self, train: Sequence[Rows], dev: Sequence[Rows | None], penalty_FR: Tensor) -> Tensor:
        """Weights (F, R, K, D + 1) of a fit per set of training rows and penalty.

        Args:
            dev: rows for early stopping, used where the solver stops early.
        """
        x_ND, label_N, num_classes = self.features_ND, self.label_N, self.num_classes
        if self.settings.solver == "senteval":
            adam = self.settings.adam
            return train_logistic(x_ND, label_N, train, dev, penalty_FR, num_classes, adam)
        weight_FRKE, num_cut_off = solve_logistic(x_ND, label_N, train, penalty_FR, num_classes)
        self.unconverged += num_cut_off
        return weight_FRKE.to(x_ND.device)

    def _accuracy(self, test: Sequence[Rows], weight_FRKE: Tensor) -> npt.NDArray[np.float64]:
        """(F, R): of each fit on the rows of its set."""
        accuracy_FR = np.zeros(weight_FRKE.shape[:2])
        for i, rows in enumerate(test):
            weight_RKE = weight_FRKE[i]
            x_VD = self.features_ND[rows].to(weight_RKE.dtype)
            logit_RVK = x_VD @ weight_RKE[..., :-1].mT + weight_RKE[:, None, :, -1]
            right_RV = logit_RVK.argmax(dim=2) == self.label_N[rows]
            accuracy_FR[i] = right_RV.double().mean(dim=1).cpu().numpy()
        return accuracy_FR
