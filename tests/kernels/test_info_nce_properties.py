"""What has to hold of InfoNCE whatever the inputs: laws between two calls, for drawn cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from loss_cases import (
    SOFTMAXES,
    Case,
    assert_agrees,
    make_case,
    option_sets,
)
from lowmem_cft_kernels import ONE_WAY, QWEN3, SYMMETRIC, Candidates, Direction, LossPath
from lowmem_cft_kernels.masks import NO_TARGET, SHARED

SETS = option_sets()
CHOICE = (frozenset({Direction.DOC_TO_QUERY}),)


def cases(*without: str, having: str | None = None) -> st.SearchStrategy[Case]:
    """Batches with options of any set that has none of these, and that one."""
    names = [
        name
        for name, settings in SETS.items()
        if not settings & set(without) and (having is None or having in settings)
    ]
    assert len(names) > 15
    size = st.integers(1, 13)
    return st.builds(
        lambda name, shape, seed: make_case(SETS[name], shape, seed=seed),
        st.sampled_from(names),
        st.tuples(size, size, st.integers(2, 7)),
        st.integers(0, 2**20),
    )


def law(**strategies: st.SearchStrategy[object]) -> Callable[[Callable[..., None]], object]:
    """A test of 100 drawn cases, the same in every run, by either path."""

    def decorate(test: Callable[..., None]) -> object:
        chosen = settings(
            max_examples=100,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        paths = st.sampled_from([LossPath.REFERENCE, LossPath.CHUNKED])
        return chosen(given(path=paths, **strategies)(test))

    return decorate


def places(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """An order, and where each then lies."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order, order.argsort()


def picked(value: Tensor | None, index: Tensor) -> Tensor | None:
    return None if value is None else value[index]


def with_docs(case: Case, index: Tensor, target: Tensor) -> Case:
    """With these of its documents; `target` names the positives among them."""
    candidates, false_negatives = case.candidates, case.options["false_negatives"]
    if false_negatives is not None:
        false_negatives = replace(
            false_negatives, doc_guide_NG=picked(false_negatives.doc_guide_NG, index)
        )
    return replace(
        case.having(false_negatives=false_negatives),
        doc_ND=case.doc_ND[index],
        candidates=replace(
            candidates,
            target=target,
            owner_N=picked(candidates.owner_N, index),
            doc_keys=picked(candidates.doc_keys, index),
        ),
    )


@law(case=cases(), seed=st.integers(0, 99))
def test_order_of_documents_changes_nothing(case: Case, seed: int, path: LossPath) -> None:
    order_N, place_N = places(len(case.doc_ND), seed)
    target = case.candidates.target
    moved = with_docs(case, order_N, torch.where(target == NO_TARGET, target, place_N[target]))
    got, wanted = moved.run(path), case.run(path)
    assert_agrees(case, replace(got, d_doc_ND=got.d_doc_ND[place_N]), wanted, 1e-10)


@law(case=cases(), seed=st.integers(0, 99))
def test_order_of_queries_changes_nothing(case: Case, seed: int, path: LossPath) -> None:
    order_M, place_M = places(len(case.query_MD), seed)
    candidates, false_negatives = case.candidates, case.options["false_negatives"]
    owner_N = candidates.owner_N
    if owner_N is not None:
        owner_N = torch.where(owner_N == SHARED, owner_N, place_M[owner_N])
    if false_negatives is not None:
        margin = false_negatives.margin
        false_negatives = replace(
            false_negatives,
            margin=margin[order_M] if isinstance(margin, Tensor) else margin,
            query_guide_MG=picked(false_negatives.query_guide_MG, order_M),
        )
    weight_M = picked(case.options["weight_M"], order_M)
    moved = replace(
        case.having(false_negatives=false_negatives, weight_M=weight_M),
        query_MD=case.query_MD[order_M],
        candidates=replace(
            candidates,
            target=candidates.target[order_M],
            owner_N=owner_N,
            query_keys=picked(candidates.query_keys, order_M),
            positive_keys=picked(candidates.positive_keys, order_M),
            own_keys=picked(candidates.own_keys, order_M),
        ),
    )
    got, wanted = moved.run(path), case.run(path)
    assert_agrees(case, replace(got, d_query_MD=got.d_query_MD[place_M]), wanted, 1e-10)


@law(case=cases("one key", "two keys", "bank", "bank without keys", "gte", "qwen3", "queries only"))
def test_documents_hidden_by_keys_might_not_be_there(case: Case, path: LossPath) -> None:
    target = case.candidates.target
    is_target_N = torch.zeros(len(case.doc_ND), dtype=torch.bool)
    is_target_N[target[target != NO_TARGET]] = True
    kept = (is_target_N | (torch.arange(len(is_target_N)) % 2 == 0)).nonzero()[:, 0]
    assume(0 < len(kept) < len(is_target_N))
    key_N = torch.full_like(is_target_N, 77, dtype=torch.int64)
    key_N[kept] = torch.arange(len(kept))
    key_M = torch.full((len(case.query_MD),), 77)
    keys = {"query_keys": key_M, "doc_keys": key_N, "positive_keys": None, "own_keys": None}
    hidden = replace(case, candidates=replace(case.candidates, **keys)).run(path)
    place_N = torch.full_like(key_N, NO_TARGET)
    place_N[kept] = torch.arange(len(kept))
    removed = with_docs(case, kept, torch.where(target == NO_TARGET, target, place_N[target])).run(
        path
    )
    gone_N = torch.ones_like(is_target_N)
    gone_N[kept] = False
    assert not hidden.d_doc_ND[gone_N].any()
    got = replace(hidden, d_doc_ND=hidden.d_doc_ND[kept], observed=removed.observed)
    assert_agrees(case, got, removed, 1e-10)
    for name in ("accuracy", "mean_rank", "mean_positive", "mean_negative"):
        pair = getattr(hidden.observed, name), getattr(removed.observed, name)
        assert torch.allclose(*pair, rtol=1e-6, atol=1e-12, equal_nan=True), name


@law(case=cases("bank", "bank without keys", *SOFTMAXES))
def test_symmetric_is_the_mean_of_both_directions(case: Case, path: LossPath) -> None:
    both = case.having(softmaxes=SYMMETRIC).run(path)
    there, back = (case.having(softmaxes=softmaxes).run(path) for softmaxes in (ONE_WAY, CHOICE))
    mean = replace(
        both,
        **{
            name: (getattr(there, name) + getattr(back, name)) / 2
            for name in ("loss", "d_query_MD", "d_doc_ND", "d_temperature")
        },
    )
    assert_agrees(case, both, mean, 1e-10)


@pytest.mark.parametrize("path", [LossPath.REFERENCE, LossPath.CHUNKED])
def test_documents_choose_as_queries_do(path: LossPath) -> None:
    """With as many documents as queries, each one's positive, the roles can be exchanged."""
    case = make_case(frozenset({"normalize"}), (11, 11, 6))
    order_M, place_N = places(11, 4)
    forth = replace(case, candidates=Candidates(target=order_M)).having(softmaxes=CHOICE)
    back = replace(
        case,
        query_MD=case.doc_ND,
        doc_ND=case.query_MD,
        candidates=Candidates(target=place_N),
    )
    got, wanted = forth.run(path), back.run(path)
    exchanged = replace(
        wanted, d_query_MD=wanted.d_doc_ND, d_doc_ND=wanted.d_query_MD, observed=got.observed
    )
    assert_agrees(forth, got, exchanged, 1e-10)


@law(case=cases("gte", "qwen3", having="bank"), share=st.floats(0, 1))
def test_a_bank_is_documents_without_a_gradient(case: Case, share: float, path: LossPath) -> None:
    """Also: a denominator of documents in two parts is that of all of them."""
    bank = case.options["bank"]
    split = round(share * len(bank.doc_CD))
    num_docs, candidates = len(case.doc_ND), case.candidates
    false_negatives = case.options["false_negatives"]
    if false_negatives is not None and false_negatives.guided:
        doc_guide_NG = torch.cat([false_negatives.doc_guide_NG, bank.guide_CG[:split]])
        false_negatives = replace(false_negatives, doc_guide_NG=doc_guide_NG)
    shared = torch.full((split,), SHARED)
    owner_N, doc_keys = candidates.owner_N, candidates.doc_keys
    moved = replace(
        case,
        doc_ND=torch.cat([case.doc_ND, bank.doc_CD[:split]]),
        candidates=replace(
            candidates,
            owner_N=None if owner_N is None else torch.cat([owner_N, shared]),
            doc_keys=None if doc_keys is None else torch.cat([doc_keys, bank.keys_C[:split]]),
        ),
    )
    rest = replace(
        bank,
        doc_CD=bank.doc_CD[split:],
        keys_C=picked(bank.keys_C, slice(split, None)),
        guide_CG=picked(bank.guide_CG, slice(split, None)),
    )
    got, wanted = (
        moved.having(false_negatives=false_negatives, bank=rest).run(path),
        case.run(path),
    )
    assert_agrees(case, replace(got, d_doc_ND=got.d_doc_ND[:num_docs]), wanted, 1e-10)


@law(case=cases("symmetric", "gte", "queries only"), softmaxes=st.sampled_from([ONE_WAY, QWEN3]))
def test_weight_zero_is_no_positive(case: Case, softmaxes: object, path: LossPath) -> None:
    case = case.having(softmaxes=softmaxes)
    left_out_M = torch.arange(len(case.query_MD)) % 3 == 1
    weight_M = case.options["weight_M"]
    if weight_M is None:
        weight_M = torch.ones(len(left_out_M))
    no_weight = case.having(weight_M=weight_M.masked_fill(left_out_M, 0.0)).run(path)
    target = case.candidates.target.clone()
    target[left_out_M] = NO_TARGET
    no_target = replace(case, candidates=replace(case.candidates, target=target)).run(path)
    assert_agrees(case, no_weight, no_target, 1e-10)


@law(case=cases(), factor=st.floats(0.01, 100))
def test_weights_are_relative(case: Case, factor: float, path: LossPath) -> None:
    weight_M = case.options["weight_M"]
    if weight_M is None:
        weight_M = torch.ones(len(case.query_MD))
    got = case.having(weight_M=weight_M.double() * factor).run(path)
    assert_agrees(case, got, case.run(path), 1e-10)


@law(case=cases(), workspace=st.integers(1, 30_000))
def test_workspace_changes_nothing(case: Case, workspace: int, path: LossPath) -> None:
    got = case.run(LossPath.CHUNKED, workspace_bytes=workspace)
    assert_agrees(case, got, case.run(path), 1e-10)


@law(case=cases(), exponents=st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
def test_norms_do_not_matter_to_cosines(
    case: Case, exponents: tuple[int, int], path: LossPath
) -> None:
    case = case.having(normalize=True)
    query_scale, doc_scale = (2.0**exponent for exponent in exponents)
    scaled = replace(
        case, query_MD=case.query_MD * query_scale, doc_ND=case.doc_ND * doc_scale
    ).run(path)
    got = replace(
        scaled,
        d_query_MD=scaled.d_query_MD * query_scale,
        d_doc_ND=scaled.d_doc_ND * doc_scale,
    )
    assert_agrees(case, got, case.run(path), 1e-10)


@law(case=cases())
def test_cosines_are_products_of_unit_vectors(case: Case, path: LossPath) -> None:
    case = case.having(normalize=True)
    query_MD, doc_ND = (x.clone().requires_grad_() for x in (case.query_MD, case.doc_ND))
    unit_query_MD, unit_doc_ND = (F.normalize(x, dim=1) for x in (query_MD, doc_ND))
    bank = case.options["bank"]
    if bank is not None:
        bank = replace(bank, doc_CD=F.normalize(bank.doc_CD, dim=1))
    units = replace(case, query_MD=unit_query_MD.detach(), doc_ND=unit_doc_ND.detach())
    plain = units.having(normalize=False, bank=bank).run(path)
    d_query_MD, d_doc_ND = torch.autograd.grad(
        [unit_query_MD, unit_doc_ND], [query_MD, doc_ND], [plain.d_query_MD, plain.d_doc_ND]
    )
    wanted = replace(plain, d_query_MD=d_query_MD, d_doc_ND=d_doc_ND)
    assert_agrees(case, case.run(path), wanted, 1e-10)
    # a gradient of a cosine does not change the norm
    assert float((case.run(path).d_query_MD * case.query_MD).sum(dim=1).abs().max()) < 1e-12


@law(case=cases("own negatives", "shared negatives", "hard hardness", "in-batch hardness"))
def test_a_shared_negative_is_a_document(case: Case, path: LossPath) -> None:
    """Whom it came with matters to hardness and where documents choose among documents."""
    assume(Direction.DOC_TO_DOC not in frozenset().union(*case.options["softmaxes"]))
    owner_N = torch.arange(len(case.doc_ND)) % len(case.query_MD)
    owned = replace(case, candidates=replace(case.candidates, owner_N=owner_N))
    assert_agrees(case, owned.run(path), case.run(path), 1e-10)
