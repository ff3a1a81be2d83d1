"""The batched solver against scikit-learn's and against the objective it states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowmem_cft.evaluation.transfer import converged as logistic
from lowmem_cft.evaluation.transfer.converged import solve_logistic

Floats = npt.NDArray[np.float64]
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


def overlapping(
    num_classes: int, num_rows: int = 600, size: int = 20, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Classes that overlap, along correlated features of very different lengths."""
    draw = np.random.default_rng(num_classes)
    lengths = np.logspace(-2, 1, size)
    centre_KD = draw.normal(size=(num_classes, size)) * 0.4 * lengths
    label_N = draw.integers(0, num_classes, num_rows)
    noise_ND = draw.normal(size=(num_rows, size)) * lengths
    noise_ND[:, 1:] += 0.5 * noise_ND[:, :-1]
    features_ND = scale * (centre_KD[label_N] + noise_ND) + 0.3
    return torch.tensor(features_ND, dtype=torch.float32), torch.tensor(label_N)


def subsets(num_rows: int) -> Tensor:
    draw = np.random.default_rng(9)
    return torch.tensor(draw.random((num_rows, 3)) < [0.5, 0.8, 0.9])


def logits(features_ND: Tensor, weight_KE: Tensor) -> Floats:
    """Centred: a constant added to all classes changes nothing."""
    logit_NK = features_ND.double() @ weight_KE[:, :-1].T + weight_KE[:, -1]
    return (logit_NK - logit_NK.mean(dim=1, keepdim=True)).numpy()


def sklearn_logits(
    features_ND: Tensor, label_N: Tensor, member_N: Tensor, penalty: float, num_classes: int
) -> Floats:
    """A column of ones in place of the intercept, which scikit-learn would not penalise."""
    from sklearn.linear_model import LogisticRegression

    x_NE = np.c_[features_ND.numpy().astype(np.float64), np.ones(len(features_ND))]
    member = member_N.numpy()
    # of two classes scikit-learn penalises w_1 - w_0, we each, which is half as much
    effective = penalty / 2 if num_classes == 2 else penalty
    model = LogisticRegression(
        C=1 / (effective * member.sum()),
        fit_intercept=False,
        solver="newton-cg",
        tol=1e-9,
        max_iter=10000,
    ).fit(x_NE[member], label_N.numpy()[member])
    logit = x_NE @ model.coef_.T
    if num_classes == 2:
        return np.c_[-logit / 2, logit / 2]
    return np.asarray(logit - logit.mean(axis=1, keepdims=True))


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_equals_scikit_learn(num_classes: int, scale: float) -> None:
    features_ND, label_N = overlapping(num_classes, scale=scale)
    member_NF = subsets(len(label_N))
    solved = solve_logistic(
        features_ND, label_N, member_NF, torch.tensor([PENALTIES] * 3), num_classes
    )
    assert solved.converged_FR.all()
    accuracies = set()
    for f, r in [(0, 0), (0, 3), (1, 1), (2, 2)]:
        got_NK = logits(features_ND, solved.weight_FRKE[f, r])
        wanted_NK = sklearn_logits(features_ND, label_N, member_NF[:, f], PENALTIES[r], num_classes)
        assert np.abs(wanted_NK).max() > 1
        np.testing.assert_allclose(got_NK, wanted_NK, atol=1e-4 * np.abs(wanted_NK).max())
        assert (got_NK.argmax(axis=1) == wanted_NK.argmax(axis=1)).all()
        accuracies.add(float((got_NK.argmax(axis=1) == label_N.numpy()).mean()))
    assert min(accuracies) > 1.2 / num_classes
    assert max(accuracies) < 1
    assert len(accuracies) > 1


def gap_bound(
    features_ND: Tensor, label_N: Tensor, member_N: Tensor, penalty: float, weight_KE: Tensor
) -> float:
    """How far the stated objective is at most from its minimum: |gradient|^2 / (2 penalty)."""
    weight_KE = weight_KE.clone().requires_grad_()
    logit_NK = features_ND.double() @ weight_KE[:, :-1].T + weight_KE[:, -1]
    entropy = functional.cross_entropy(logit_NK[member_N], label_N[member_N])
    (entropy + penalty / 2 * weight_KE.square().sum()).backward()
    assert weight_KE.grad is not None
    return float(weight_KE.grad.square().sum()) / (2 * penalty)


def separable() -> tuple[Tensor, Tensor]:
    features_ND, label_N = overlapping(3)
    return torch.cat([features_ND, 4.0 * functional.one_hot(label_N)], dim=1), label_N


def singular() -> tuple[Tensor, Tensor]:
    """A column twice, one of zeros, and fewer rows than columns."""
    features_ND, label_N = overlapping(3, num_rows=18)
    zeros_N1 = torch.zeros((18, 1))
    return torch.cat([features_ND, features_ND[:, :1], zeros_N1], dim=1), label_N


@pytest.mark.parametrize("case", [lambda: overlapping(3, scale=10.0), separable, singular])
def test_the_stated_objective_is_at_its_minimum(
    case: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    features_ND, label_N = case()
    member_NF = torch.ones((len(label_N), 1), dtype=torch.bool)
    member_NF[::7] = False
    solved = solve_logistic(features_ND, label_N, member_NF, torch.tensor([PENALTIES]), 3)
    assert solved.converged_FR.all()
    assert solved.iterations < 40  # what the guessed Hessian is for
    at_start = torch.zeros_like(solved.weight_FRKE[0, 0])
    for r, penalty in enumerate(PENALTIES):
        bound = lambda w, p=penalty: gap_bound(features_ND, label_N, member_NF[:, 0], p, w)
        assert bound(solved.weight_FRKE[0, r]) < 1e-6
        assert bound(at_start) > 1e-2


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("scale", [1e4, 1e5, 1e7])
def test_large_features_that_repeat(num_classes: int, scale: float) -> None:
    """Rounding is larger than the penalty, which then hardly counts: the logits are of one copy."""
    features_ND, label_N = overlapping(num_classes, scale=scale)
    member_NF, penalty_FR = subsets(len(label_N)), torch.tensor([PENALTIES] * 3)
    repeated_ND = features_ND.repeat(1, 3)
    one = solve_logistic(features_ND, label_N, member_NF, penalty_FR, num_classes)
    three = solve_logistic(repeated_ND, label_N, member_NF, penalty_FR, num_classes)
    assert one.converged_FR.all()
    assert three.converged_FR.all()
    assert three.iterations < 40
    for f in range(3):
        wanted_NK = logits(features_ND, one.weight_FRKE[f, 0])
        assert np.abs(wanted_NK).max() > 1
        np.testing.assert_allclose(
            logits(repeated_ND, three.weight_FRKE[f, 0]), wanted_NK, atol=1e-5
        )


def test_features_that_are_not_finite_are_no_fit() -> None:
    features_ND, label_N = overlapping(2)
    features_ND[3, 5] = float("nan")
    with pytest.raises(RuntimeError, match="cholesky"):
        solve_logistic(features_ND, label_N, subsets(600)[:, :1], torch.tensor([[1e-3]]), 2)


def test_blocks_change_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    features_ND, label_N = overlapping(3)
    args = (features_ND, label_N, subsets(len(label_N)), torch.tensor([PENALTIES] * 3), 3)
    whole = solve_logistic(*args)
    monkeypatch.setattr(logistic, "_BLOCK_ROWS", 77)
    blocks = solve_logistic(*args)
    assert whole.iterations == blocks.iterations
    np.testing.assert_allclose(whole.weight_FRKE, blocks.weight_FRKE, rtol=1e-8, atol=1e-8)


def test_models_solved_with_others_or_alone_reach_the_same_minimum() -> None:
    features_ND, label_N = overlapping(3)
    member_NF, penalty_FR = subsets(len(label_N)), torch.tensor([PENALTIES] * 3)
    penalty_FR[0] = penalty_FR[0].flip(0)  # each subset has an order of its own
    together = solve_logistic(features_ND, label_N, member_NF, penalty_FR, 3)
    for f, r in [(0, 0), (1, 2)]:
        alone = solve_logistic(features_ND, label_N, member_NF[:, [f]], penalty_FR[f, [r]][None], 3)
        a_NK = logits(features_ND, together.weight_FRKE[f, r])
        b_NK = logits(features_ND, alone.weight_FRKE[0, 0])
        assert np.abs(a_NK).max() > 1
        np.testing.assert_allclose(a_NK, b_NK, atol=1e-4)


def test_rows_outside_a_subset_do_not_count() -> None:
    features_ND, label_N = overlapping(2)
    member_NF = subsets(len(label_N))[:, :1]
    wrong_N = torch.where(member_NF[:, 0], label_N, 1 - label_N)
    assert (wrong_N != label_N).any()
    penalty_FR = torch.tensor([[1e-3]])
    right = solve_logistic(features_ND, label_N, member_NF, penalty_FR, 2)
    wrong = solve_logistic(features_ND, wrong_N, member_NF, penalty_FR, 2)
    assert torch.equal(right.weight_FRKE, wrong.weight_FRKE)


def test_a_fit_cut_off_says_so() -> None:
    features_ND, label_N = overlapping(2)
    member_NF = subsets(len(label_N))
    penalty_FR = torch.tensor([PENALTIES] * 3)
    cut = solve_logistic(features_ND, label_N, member_NF, penalty_FR, 2, max_iterations=2)
    assert cut.iterations == 2
    assert not cut.converged_FR.any()
    assert cut.weight_FRKE.abs().amax(dim=(2, 3)).min() > 0  # where it got to


def test_no_penalty_is_refused() -> None:
    features_ND, label_N = overlapping(2)
    with pytest.raises(ValueError, match=r"L2 penalties: got 0\.0, wanted more than 0"):
        solve_logistic(features_ND, label_N, subsets(600)[:, :1], torch.tensor([[1e-3, 0.0]]), 2)
