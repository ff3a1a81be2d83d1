"""The formula of InfoNCE against plain Python, its gradient against differences of the latter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loss_cases import (
    SETTINGS,
    Case,
    Shape,
    assert_substantial,
    drawn_set,
    make_case,
    observed,
    option_sets,
    singles,
)
from lowmem_cft_kernels import Candidates, Direction, LossOptions, LossPath, Negatives, info_nce
from lowmem_cft_kernels.masks import NO_TARGET, SHARED
from lowmem_cft_kernels.reference import reference_loss

Vector = list[float]

SETS = option_sets()
EVERY_SET = pytest.mark.parametrize("name", SETS)
_BY_SIMILARITY = {"absolute margin", "relative margin", "margin per row", "guides"}
TINY: list[Shape] = [(1, 1, 4), (2, 3, 5), (5, 3, 4)]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def log_sum_exp(logits: list[float]) -> float:
    top = max(logits)
    return top + math.log(math.fsum(math.exp(logit - top) for logit in logits))


class Loops:
    """The loss of a case, one pair of texts at a time.

    Documents of the bank are numbered on after the others. `constant` is a case of the same batch
    whose similarities stand where a similarity counts as a constant for the gradient.
    """

    def __init__(self, case: Case, constant: Case | None = None) -> None:
        self.options, self.candidates = case.options, case.candidates
        bank = self.options["bank"]
        self.queries, self.docs = case.query_MD.tolist(), case.doc_ND.tolist()
        self.num_docs, self.temperature = len(self.docs), case.temperature
        if bank is not None:
            self.docs += bank.doc_CD.tolist()
        self.positives = [
            [t for t in row if t != NO_TARGET] for row in case.candidates.target_MP.tolist()
        ]
        self.constant = self if constant is None else Loops(constant)

    def similarity(self, a: Vector, b: Vector) -> float:
        return cosine(a, b) if self.options["normalize"] else dot(a, b)

    def query_doc(self, i: int, j: int) -> float:
        return self.similarity(self.queries[i], self.docs[j])

    def weight(self, i: int) -> float:
        return 1.0 if self.options["weight_M"] is None else float(self.options["weight_M"][i])

    # who is a false negative

    def guided(self, a: tuple[str, int], b: tuple[str, int]) -> float:
        """Similarity of two texts that decides, each ("query", i) or ("doc", j)."""
        options = self.options["false_negatives"]
        if not options.guided:
            of = {"query": self.queries, "doc": self.docs}
            return self.similarity(of[a[0]][a[1]], of[b[0]][b[1]])
        guides = {"query": options.query_guide_MG, "doc": options.doc_guide_NG}
        if self.options["bank"] is not None:
            guides["doc"] = torch.cat([guides["doc"], self.options["bank"].guide_CG])
        return cosine(guides[a[0]][a[1]].tolist(), guides[b[0]][b[1]].tolist())

    def bound(self, i: int) -> float:
        options = self.options["false_negatives"]
        best = max(self.guided(("query", i), ("doc", t)) for t in self.positives[i])
        margin = options.margin if isinstance(options.margin, float) else float(options.margin[i])
        return best - margin * (abs(best) if options.relative else 1.0)

    def is_false_negative(self, a: tuple[str, int], b: tuple[str, int], of: list[int]) -> bool:
        """Of what is compared for these queries, the most permissive of which decides."""
        if self.options["false_negatives"] is None:
            return False
        return self.guided(a, b) > max(map(self.bound, of))

    # who sees whom

    def query_key(self, i: int) -> set[int]:
        key_MK = self.candidates.query_key_MK
        return set() if key_MK is None else set(key_MK[i].tolist())

    def positive_key(self, i: int) -> set[int]:
        keys = self.candidates.positive_keys
        return self.query_key(i) if keys is None else set(keys[i].flatten().tolist())

    def doc_key(self, j: int) -> set[int]:
        bank, doc_keys = self.options["bank"], self.candidates.doc_keys
        if j < self.num_docs:
            return set() if doc_keys is None else {int(doc_keys[j])}
        return set() if bank.keys_C is None else {int(bank.keys_C[j - self.num_docs])}

    def owner(self, j: int) -> int:
        owner_N = self.candidates.owner_N
        return SHARED if owner_N is None or j >= self.num_docs else int(owner_N[j])

    def related(self, i: int, j: int) -> bool:
        """Query i and document j may be compared, whatever their similarity."""
        if self.candidates.own_only and self.owner(j) not in (SHARED, i):
            return False
        return not self.query_key(i) & self.doc_key(j)

    def query_sees(self, i: int, j: int) -> bool:
        if j in self.positives[i]:
            return True
        return self.related(i, j) and not self.is_false_negative(("query", i), ("doc", j), [i])

    def seen_by_doc(self, t: int, k: int) -> bool:
        """Positive t may choose query k."""
        if t in self.positives[k]:
            return True
        choosers = [i for i, positives in enumerate(self.positives) if t in positives]
        own_keys = self.candidates.own_keys
        if own_keys is not None:
            of_one = len(choosers) == 1
            related = self.positive_key(choosers[0]) if of_one else self.doc_key(t)
            if int(own_keys[k]) in related:
                return False
        return self.related(k, t) and not self.is_false_negative(("query", k), ("doc", t), choosers)

    def query_sees_query(self, i: int, k: int) -> bool:
        if i == k or self.query_key(i) & self.query_key(k):
            return False
        return not self.is_false_negative(("query", i), ("query", k), [i])

    def positive_sees_doc(self, i: int, t: int, j: int) -> bool:
        """Of the pair of query i and its positive t."""
        hidden_keys = self.doc_key(t) | self.positive_key(i)
        if j in self.positives[i] or self.owner(j) == i or hidden_keys & self.doc_key(j):
            return False
        return not self.is_false_negative(("doc", t), ("doc", j), [i])

    # the loss

    def hardness(self, i: int, j: int) -> float:
        hardness = self.options["hardness"]
        if hardness is None or j in self.positives[i]:
            return 0.0
        own = self.owner(j) == i
        if hardness.on is not Negatives.ALL and own != (hardness.on is Negatives.HARD):
            return 0.0
        return float(hardness.strength) * self.constant.query_doc(i, j)

    def logits(self, direction: Direction, i: int, t: int) -> list[float]:
        """Of the candidates that the pair of query i and its positive t is compared with."""
        queries, docs, constant = range(len(self.queries)), range(self.num_docs), self.constant
        if direction is Direction.QUERY_TO_DOC:
            return [
                self.query_doc(i, j) / self.temperature + self.hardness(i, j)
                for j in range(len(self.docs))
                if constant.query_sees(i, j)
            ]
        if direction is Direction.DOC_TO_QUERY:
            similarities = [self.query_doc(k, t) for k in queries if constant.seen_by_doc(t, k)]
        elif direction is Direction.QUERY_TO_QUERY:
            similarities = [
                self.similarity(self.queries[i], self.queries[k])
                for k in queries
                if constant.query_sees_query(i, k)
            ]
        else:
            similarities = [
                self.similarity(self.docs[t], self.docs[j])
                for j in docs
                if constant.positive_sees_doc(i, t, j)
            ]
        return [similarity / self.temperature for similarity in similarities]

    def pair_loss(self, i: int, t: int) -> float:
        softmaxes = self.options["softmaxes"]
        denominators = [
            log_sum_exp([logit for direction in softmax for logit in self.logits(direction, i, t)])
            for softmax in softmaxes
        ]
        return math.fsum(denominators) / len(softmaxes) - self.query_doc(i, t) / self.temperature

    def loss(self) -> float:
        weights, losses = [], []
        for i, positives in enumerate(self.positives):
            if positives:
                weights.append(self.weight(i))
                pairs = [self.pair_loss(i, t) for t in positives]
                losses.append(weights[-1] * math.fsum(pairs) / len(pairs))
        return math.fsum(losses) / math.fsum(weights) if any(weights) else 0.0

    def observed(self) -> dict[str, float]:
        counted = [i for i, targets in enumerate(self.positives) if targets and self.weight(i) > 0]
        ranks, positives, negatives, hidden = [], [], [], 0
        for i in counted:
            similarities = [self.query_doc(i, j) for j in range(len(self.docs))]
            positives += [similarities[t] for t in self.positives[i]]
            others = [j for j in range(len(self.docs)) if j not in self.positives[i]]
            visible = [similarities[j] for j in others if self.query_sees(i, j)]
            best = max(similarities[t] for t in self.positives[i])
            ranks.append(1 + sum(similarity > best for similarity in visible))
            negatives += visible
            hidden += len(others) - len(visible)
        return {
            "accuracy": mean([float(rank == 1) for rank in ranks]),
            "mean_rank": mean(ranks),
            "masked_share": mean([1.0] * hidden + [0.0] * len(negatives)),
            "mean_positive": mean(positives),
            "mean_negative": mean(negatives),
        }


def mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def assert_equals_loops(case: Case) -> dict[str, float]:
    loops, got = Loops(case), case.run(LossPath.REFERENCE)
    assert float(got.loss) == pytest.approx(loops.loss(), rel=1e-12, abs=1e-13)
    wanted = loops.observed()
    for name, value in observed(got).items():
        # shares and ranks of float64 inputs are divided as float32
        assert value == pytest.approx(wanted[name], rel=1e-6, abs=1e-13, nan_ok=True), name
    return wanted


@EVERY_SET
def test_reference_equals_loops(name: str) -> None:
    case = make_case(SETS[name], (7, 11, 6))
    wanted = assert_equals_loops(case)
    assert_substantial(case.run(LossPath.REFERENCE))
    hides = {"own negatives", "one key", "two keys", *_BY_SIMILARITY}
    assert bool(wanted["masked_share"]) == bool(SETS[name] & hides)
    assert wanted["masked_share"] < 1
    if not SETS[name] & _BY_SIMILARITY:
        assert 0 < wanted["accuracy"] < 1


@pytest.mark.parametrize("seed", range(100))
def test_reference_equals_loops_for_any_options_at_once(seed: int) -> None:
    assert_equals_loops(make_case(drawn_set(seed), (8, 7, 5), seed=seed))


@pytest.mark.parametrize("shape", TINY, ids=str)
@pytest.mark.parametrize("name", [name for name in SETS if "+" not in name])
def test_reference_equals_loops_on_few_texts(name: str, shape: Shape) -> None:
    assert_equals_loops(make_case(SETS[name], shape))


def test_every_setting_changes_the_loss() -> None:
    """Else the tests over all sets would compare the same thing again and again."""
    losses = {
        name: Loops(make_case(settings, (7, 11, 6))).loss() for name, settings in singles().items()
    }
    same = {
        # differ where there are keys to leave out, which neither is alone
        frozenset({"bank", "bank without keys"}),
        # who owns a shared negative matters to hardness and to documents alone
        frozenset({"plain", "shared negatives"}),
    }
    names = list(losses)
    groups = {
        frozenset({a, b})
        for n, a in enumerate(names)
        for b in names[n + 1 :]
        if math.isclose(losses[a], losses[b], rel_tol=1e-9)
    }
    assert groups == same
    pairs = [
        ("one key + bank", "one key + bank without keys"),
        ("shared negatives + gte", "gte"),
        ("own negatives + guides", "guides"),
    ]
    for first, second in pairs:
        a, b = (Loops(make_case(SETS[name], (7, 11, 6))).loss() for name in (first, second))
        assert not math.isclose(a, b, rel_tol=1e-9), (first, second)


# gradients


def leaves(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    temperature = torch.tensor(case.temperature, dtype=torch.float64)
    query_MD, doc_ND, temperature = (
        tensor.clone().requires_grad_() for tensor in (case.query_MD, case.doc_ND, temperature)
    )
    return query_MD, doc_ND, temperature


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, settings in SETS.items()
        # what hardness adds is a constant for the gradient, so differences see another slope
        if not any(SETTINGS[setting] == "hardness" for setting in settings)
        and (len(settings) != 2 or settings & {"gte", "qwen3", "symmetric", "queries only"})
    ],
)
def test_gradcheck(name: str) -> None:
    case = make_case(SETS[name], (4, 5, 3))
    options = {key: value for key, value in case.options.items() if key != "temperature"}

    def loss(query_MD: Tensor, doc_ND: Tensor, temperature: Tensor) -> Tensor:
        return reference_loss(
            query_MD, doc_ND, case.candidates, LossOptions(temperature=temperature, **options)
        )[0]

    assert torch.autograd.gradcheck(loss, leaves(case), fast_mode=len(SETS[name]) == 2)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, settings in SETS.items()
        if any(SETTINGS[setting] == "hardness" for setting in settings) or len(settings) < 2
    ],
)
def test_gradient_equals_differences_of_loops(name: str) -> None:
    case = make_case(SETS[name], (5, 7, 3))
    result = case.run(LossPath.REFERENCE)
    draw, step = torch.Generator().manual_seed(3), 1e-5
    v_query_MD, v_doc_ND = (
        torch.randn(x.shape, generator=draw, dtype=x.dtype) for x in (case.query_MD, case.doc_ND)
    )

    def moved(sign: int) -> float:
        there = replace(
            case.having(temperature=case.temperature + sign * step),
            query_MD=case.query_MD + sign * step * v_query_MD,
            doc_ND=case.doc_ND + sign * step * v_doc_ND,
        )
        return Loops(there, constant=case).loss()

    wanted = (moved(+1) - moved(-1)) / (2 * step)
    got = (
        (result.d_query_MD * v_query_MD).sum()
        + (result.d_doc_ND * v_doc_ND).sum()
        + result.d_temperature
    )
    assert abs(wanted) > 1e-3
    assert float(got) == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def test_a_bank_gets_no_gradient() -> None:
    case = make_case(SETS["bank + normalize"], (7, 11, 6))
    case.options["bank"].doc_CD.requires_grad_()
    query_MD = case.query_MD.requires_grad_()
    loss, _ = reference_loss(query_MD, case.doc_ND, case.candidates, LossOptions(**case.options))
    loss.backward()
    assert query_MD.grad is not None
    assert case.options["bank"].doc_CD.grad is None


# what is observed, and who is compared


def test_a_tie_counts_as_first() -> None:
    query_MD, doc_ND = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    for path in (LossPath.REFERENCE, LossPath.CHUNKED):
        result = info_nce(
            query_MD, doc_ND, Candidates(target=torch.tensor([1, 0])), temperature=1.0, path=path
        )
        assert observed(result) == {
            "accuracy": 0.5,
            "mean_rank": 1.5,
            "masked_share": 0.0,
            "mean_positive": 0.5,
            "mean_negative": 0.375,
        }


def test_losses_by_hand() -> None:
    """Two queries, three documents: every softmax spelled out."""
    e, asking = math.exp, {Direction.QUERY_TO_DOC}
    query_MD = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    doc_ND = torch.tensor([[2.0, 0.0], [1.0, 3.0], [0.0, 1.0]], dtype=torch.float64)
    # similarities: [2, 1, 0] and [0, 3, 1]; of queries 0; of documents 0: [4, 2, 0], 1: [2, 10, 3]
    candidates = Candidates(target=torch.tensor([0, 1]), owner_N=torch.tensor([SHARED, SHARED, 0]))
    wanted = {
        frozenset(asking): (
            math.log(e(2) + e(1) + e(0)) - 2 + math.log(e(0) + e(3) + e(1)) - 3,
            math.log(e(2) + e(1) + e(0)) - 2 + math.log(e(0) + e(3)) - 3,
        ),
        frozenset(asking | {Direction.QUERY_TO_QUERY}): (
            math.log(e(2) + e(1) + e(0) + e(0)) - 2 + math.log(e(0) + e(3) + e(1) + e(0)) - 3,
            math.log(e(2) + e(1) + e(0) + e(0)) - 2 + math.log(e(0) + e(3) + e(0)) - 3,
        ),
        frozenset({Direction.DOC_TO_QUERY}): (
            math.log(e(2) + e(0)) - 2 + math.log(e(1) + e(3)) - 3,
            math.log(e(2) + e(0)) - 2 + math.log(e(1) + e(3)) - 3,
        ),
        frozenset(asking | {Direction.DOC_TO_DOC}): (
            math.log(e(2) + e(1) + e(0) + e(2))
            - 2
            + math.log(e(0) + e(3) + e(1) + e(2) + e(3))
            - 3,
            math.log(e(2) + e(1) + e(0) + e(2)) - 2 + math.log(e(0) + e(3) + e(2) + e(3)) - 3,
        ),
    }
    for softmax, by_own_only in wanted.items():
        for own_only, total in zip((False, True), by_own_only, strict=True):
            for path in (LossPath.REFERENCE, LossPath.CHUNKED):
                result = info_nce(
                    query_MD,
                    doc_ND,
                    replace(candidates, own_only=own_only),
                    temperature=1.0,
                    softmaxes=(softmax,),
                    path=path,
                )
                assert float(result.loss) == pytest.approx(total / 2, rel=1e-13)


def test_candidates_move() -> None:
    device = torch.device("meta")
    candidates = make_case(SETS["own negatives + two keys"], (2, 3, 5)).candidates
    moved = candidates.to(device)
    for name in ("target", "owner_N", "query_keys", "doc_keys"):
        assert getattr(moved, name).device == device
    assert moved.own_only
    assert Candidates(target=candidates.target).to(device).owner_N is None
