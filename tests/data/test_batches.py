"""Which rows a step takes, and which texts that makes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from by_text import drawn_case
from launches import recorded
from lowmem_cft.data import batches
from lowmem_cft.data.batches import NO_TEXT, RowOrder, RowTable, StepTexts, step_texts
from lowmem_cft.gradient.embedding_cache import DTYPES
from lowmem_cft.gradient.step import _info_nce, candidates_of
from lowmem_cft.recipe.schema import LossSection
from lowmem_cft_kernels import SOFTMAXES, Candidates, LearnedTemperature, LossPath, info_nce
from lowmem_cft_kernels.masks import SHARED
from numerics import relative_error
from syncs import HostWaits

Indices = npt.NDArray[np.int64]

# --- the order --------------------------------------------------------------------------------


def epoch_of(order: RowOrder, epoch: int) -> list[int]:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return [int(row) for step in steps for row in order.rows(step)]


def test_an_epoch_visits_every_row_once() -> None:
    order = RowOrder([30, 18], [1, 1], logical_batch=8, seed=0)
    assert (order.rows_per_epoch, order.steps_per_epoch) == (48, 6)
    for epoch in range(3):
        assert sorted(epoch_of(order, epoch)) == list(range(48))
    assert all(len(order.rows(step)) == 8 for step in range(18))


def test_rows_that_fill_no_batch_are_left_out() -> None:
    order = RowOrder([50], [1], logical_batch=8, seed=0)
    assert (order.rows_per_epoch, order.steps_per_epoch) == (50, 6)
    left_out = set()
    for epoch in range(4):
        visited = epoch_of(order, epoch)
        assert len(visited) == len(set(visited)) == 48
        left_out |= set(range(50)) - set(visited)
    assert len(left_out) > 2, "always the same rows are left out"


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ((2.0, 1.0), [(20, 2, 2), (10, 1, 1)]),
        ((1.0, 0.5), [(20, 1, 1), (5, 0, 1)]),
        ((0.5, 2.0), [(10, 0, 1), (10, 2, 2)]),
        ((1.5, 0.1), [(20, 1, 2), (1, 0, 1)]),
    ],
    ids=lambda value: "+".join(map(str, value)) if isinstance(value[0], float) else "",
)
def test_weights(weights: tuple[float, float], wanted: list[tuple[int, int, int]]) -> None:
    """(different rows visited, fewest visits, most visits) of a source of 20 rows and one of 10."""
    order = RowOrder([20, 10], weights, logical_batch=1, seed=3)
    assert order.rows_per_epoch == sum(round(w * n) for w, n in zip(weights, (20, 10), strict=True))
    visits = Counter(epoch_of(order, 0))
    for (different, fewest, most), rows in zip(wanted, (range(20), range(20, 30)), strict=True):
        counts = [visits[row] for row in rows]
        assert (sum(map(bool, counts)), min(counts), max(counts)) == (different, fewest, most)
    assert set(visits) <= set(range(30))


def test_half_of_the_rows_are_others_in_another_epoch() -> None:
    order = RowOrder([40], [0.5], logical_batch=4, seed=0)
    halves = [frozenset(epoch_of(order, epoch)) for epoch in range(4)]
    assert {len(half) for half in halves} == {20}
    assert len(set(halves)) == 4


def test_sources_are_mixed() -> None:
    order = RowOrder([64, 64], [1, 1], logical_batch=32, seed=0)
    shares = [float((order.rows(step) < 64).mean()) for step in range(4)]
    assert all(0.2 < share < 0.8 for share in shares)


def test_order_is_a_function_of_seed_and_step() -> None:
    def make(seed: int) -> RowOrder:
        return RowOrder([20, 13], [1, 0.5], logical_batch=4, seed=seed)

    straight = make(5)
    wanted = {step: straight.rows(step).tolist() for step in range(18)}
    resumed = make(5)
    for step in (17, 3, 8, 0, 9, 16):  # in any order, as after a restart
        assert resumed.rows(step).tolist() == wanted[step]
    assert [make(6).rows(step).tolist() for step in range(6)] != [wanted[s] for s in range(6)]
    first, second = (epoch_of(straight, epoch) for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("sizes", "weights", "rows"),
    [([10, 5], [1.0, 1.0], 15), ([20], [0.5], 10), ([31], [0.5], 16)],
    ids=["two sources", "half a source", "rounded"],
)
def test_a_batch_larger_than_an_epoch(sizes: list[int], weights: list[float], rows: int) -> None:
    message = rf"train.logical_batch: got {rows + 1}, but an epoch has only {rows} rows"
    with pytest.raises(ValueError, match=message):
        RowOrder(sizes, weights, logical_batch=rows + 1, seed=0)
    assert RowOrder(sizes, weights, logical_batch=rows, seed=0).steps_per_epoch == 1


# --- the texts of a step ----------------------------------------------------------------------

# row:       0   1   2   3   4
ANCHOR = [10, 11, 12, 13, 10]
POSITIVE = [20, 21, 20, 13, 24]
NEGATIVE = [[30, 31], [20, NO_TEXT], [NO_TEXT, NO_TEXT], [33, 34], [30, NO_TEXT]]
TABLE = RowTable(np.array(ANCHOR), np.array(POSITIVE), np.array(NEGATIVE))
ROWS = np.array([3, 0, 4, 2, 1])
QUERIES = [13, 10, 10, 12, 11]
POSITIVES = [13, 20, 24, 20, 21]
NEGATIVES = [33, 34, 30, 31, 30, 20]
OWNERS = [0, 0, 1, 1, 2, 4]  # places in the batch, not rows of the table


def gather(
    hard_negatives: str = "batch", mask_duplicates: bool = False, encode_twins_once: bool = False
) -> StepTexts:
    return step_texts(
        TABLE,
        ROWS,
        hard_negatives=hard_negatives,
        mask_duplicates=mask_duplicates,
        encode_twins_once=encode_twins_once,
    )


TWINS = pytest.mark.parametrize("twins", [False, True], ids=["each text", "twins once"])


@TWINS
@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("hard_negatives", ["batch", "own", "none"])
def test_places_and_roles(hard_negatives: str, mask: bool, twins: bool) -> None:
    texts = gather(hard_negatives, mask, twins)
    negatives = [] if hard_negatives == "none" else NEGATIVES
    assert texts.text_P[texts.place_S[: texts.num_queries].numpy()].tolist() == QUERIES
    assert (
        texts.text_P[texts.place_S[texts.num_queries :].numpy()].tolist() == POSITIVES + negatives
    )
    candidates = candidates_of(texts)
    assert candidates.target.tolist() == [0, 1, 2, 3, 4]
    candidates.validate(5, 5 + len(negatives))
    assert candidates.owner_N is not None
    assert candidates.owner_N.tolist() == [SHARED] * 5 + (OWNERS if negatives else [])
    assert candidates.own_only is (hard_negatives == "own")
    if mask:
        assert candidates.query_keys is not None
        assert candidates.doc_keys is not None
        keys = [[*pair, pair[1]] for pair in zip(POSITIVES, QUERIES, strict=True)]
        keys[1][2], keys[2][2] = 24, 20  # the anchor 10 has two rows
        assert candidates.query_keys.tolist() == keys
        assert candidates.doc_keys.tolist() == POSITIVES + negatives
    else:
        assert candidates.query_keys is candidates.doc_keys is None


@pytest.mark.parametrize("hard_negatives", ["batch", "own", "none"])
def test_twins_are_encoded_once_or_each(hard_negatives: str) -> None:
    negatives = [] if hard_negatives == "none" else NEGATIVES
    everything = QUERIES + POSITIVES + negatives
    each, once = gather(hard_negatives), gather(hard_negatives, encode_twins_once=True)
    assert each.text_P.tolist() == everything
    assert each.place_S.tolist() == list(range(len(everything)))
    assert sorted(once.text_P.tolist()) == sorted(set(everything))
    assert len(once.text_P) < len(everything)
    for texts in (each, once):
        assert texts.text_P.dtype == np.int64
        assert texts.place_S.dtype == torch.int64
        used = texts.place_S.tolist()
        assert set(used) == set(range(len(texts.text_P)))


def hidden_places(texts: StepTexts) -> list[list[int]]:
    """For each query the documents that its loss does not depend on: they get no gradient from it."""
    draw = torch.Generator().manual_seed(0)
    emb_PD = torch.randn(len(texts.text_P), 6, generator=draw, dtype=torch.float64)
    query_MD, doc_ND = emb_PD[texts.place_S].tensor_split([texts.num_queries])
    hidden = []
    for i in range(texts.num_queries):
        alone_M = (torch.arange(texts.num_queries) == i).double()
        result = info_nce(query_MD, doc_ND, candidates_of(texts), temperature=1.0, weight_M=alone_M)
        hidden.append((result.d_doc_ND == 0).all(dim=1).nonzero()[:, 0].tolist())
    return hidden


def test_duplicates_of_a_positive_are_hidden_from_its_query() -> None:
    # places 1 and 3 share the positive 20, which is also the negative of place 4; places 1 and 2
    # are rows of one anchor
    masked = hidden_places(gather("batch", mask_duplicates=True))
    assert masked == [[], [2, 3, 10], [1, 3, 10], [1, 10], []]
    assert hidden_places(gather("batch")) == [[], [], [], [], []]


def test_a_document_that_is_the_query_itself_is_hidden_from_it() -> None:
    # the anchor of row 1 is the positive of row 0 and the negative of row 2
    table = RowTable(np.array([1, 2, 3]), np.array([2, 4, 5]), np.array([[6], [7], [2]]))
    options: dict[str, Any] = {"hard_negatives": "batch", "encode_twins_once": True}
    rows = np.arange(3)
    masked = step_texts(table, rows, mask_duplicates=True, **options)
    assert hidden_places(masked) == [[5], [0, 5], []]
    plain = step_texts(table, rows, mask_duplicates=False, **options)
    assert hidden_places(plain) == [[], [], []]


def naive_keys(table: RowTable, rows: Any, documents: list[int]) -> list[set[int]]:
    """What must not be a negative of each row's anchor, by going through all rows."""
    keys = []
    for row in rows:
        anchor = table.anchor_N[row]
        same = [i for i in range(len(table)) if table.key(table.anchor_N[i]) == table.key(anchor)]
        hidden = {int(table.key(table.positive_N[i])) for i in same} & set(documents)
        keys.append(hidden | {int(table.key(anchor)), int(table.key(table.positive_N[row]))})
    return keys


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("templates", [1, 2])
def test_no_positive_of_an_anchor_is_a_negative_of_it(seed: int, templates: int) -> None:
    """Anchors of several rows, positives of several anchors, texts that are both."""
    draw = np.random.default_rng(seed)
    size = 12
    anchor, positive = draw.integers(0, size, (2, 60))
    negative = draw.integers(-1, size, (60, 2))
    same = None
    if templates == 2:  # documents are other texts than queries, and equal to them in pairs
        positive, negative = positive + size, np.where(negative < 0, NO_TEXT, negative + size)
        same = np.tile(np.arange(size), 2)
    table = RowTable(anchor, positive, negative, same)
    rows = draw.permutation(60)[:9]
    texts = step_texts(
        table, rows, hard_negatives="batch", mask_duplicates=True, encode_twins_once=False
    )
    assert texts.query_key_MK is not None
    assert texts.doc_key_N is not None
    documents = texts.doc_key_N.tolist()
    got = [set(keys) for keys in texts.query_key_MK.tolist()]
    assert got == naive_keys(table, rows, documents)
    hidden = hidden_places(texts)
    for i, keys in enumerate(got):
        expected = [n for n, key in enumerate(documents) if key in keys and n != i]
        assert hidden[i] == expected


@pytest.mark.parametrize("path", [LossPath.REFERENCE, LossPath.CHUNKED])
@pytest.mark.parametrize("softmaxes", SOFTMAXES)
def test_no_positive_is_a_negative_in_any_direction(softmaxes: str, path: LossPath) -> None:
    for seed in range(20):
        case, by_text = drawn_case(seed, softmaxes)
        wanted = by_text.loss(softmaxes)
        assert float(case.run(path).loss) == pytest.approx(wanted, rel=1e-12), seed


def test_an_anchor_of_one_row_has_two_keys() -> None:
    """And no more: blocks with few keys take the faster kernels."""
    table = RowTable(np.arange(4), np.arange(4, 8), np.full((4, 0), NO_TEXT))
    texts = step_texts(
        table, np.arange(3), hard_negatives="batch", mask_duplicates=True, encode_twins_once=True
    )
    assert texts.query_key_MK is not None
    assert texts.query_key_MK.tolist() == [[4, 0], [5, 1], [6, 2]]


def test_own_negatives_are_hidden_from_other_rows() -> None:
    others = [[5 + j for j, owner in enumerate(OWNERS) if owner != i] for i in range(5)]
    assert hidden_places(gather("own")) == others
    assert sum(map(len, others)) == 4 * len(OWNERS)


def test_without_negatives_in_the_table() -> None:
    pairs = RowTable(TABLE.anchor_N, TABLE.positive_N, TABLE.negative_NK[:, :0])
    assert len(pairs) == 5
    options: dict[str, Any] = {"mask_duplicates": True, "encode_twins_once": False}
    for hard_negatives in ("batch", "own", "none"):
        texts = step_texts(pairs, ROWS, hard_negatives=hard_negatives, **options)
        assert texts.text_P.tolist() == QUERIES + POSITIVES
        candidates_of(texts).validate(5, 5)


def loss_of(texts: StepTexts, embedding_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient for every text of the table."""
    emb_PD = embedding_TD[torch.from_numpy(texts.text_P)]
    result = info_nce(
        emb_PD[texts.place_S[: texts.num_queries]],
        emb_PD[texts.place_S[texts.num_queries :]],
        candidates_of(texts),
        temperature=0.5,
    )
    gradient_TD = torch.zeros_like(embedding_TD)
    text_P = torch.from_numpy(texts.text_P)
    gradient_TD.index_add_(0, text_P[texts.place_S[: texts.num_queries]], result.d_query_MD)
    gradient_TD.index_add_(0, text_P[texts.place_S[texts.num_queries :]], result.d_doc_ND)
    return result.loss, gradient_TD


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("hard_negatives", ["batch", "own", "none"])
def test_twins_do_not_change_the_loss(hard_negatives: str, mask: bool) -> None:
    embedding_TD = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    loss, gradient = loss_of(gather(hard_negatives, mask), embedding_TD)
    once_loss, once_gradient = loss_of(gather(hard_negatives, mask, True), embedding_TD)
    assert float(loss) > 0.1
    assert relative_error(once_loss, loss) <= 1e-12
    assert relative_error(once_gradient, gradient) <= 1e-12


def test_every_option_changes_the_loss() -> None:
    embedding_TD = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    losses = {
        float(loss_of(gather(hard_negatives, mask), embedding_TD)[0])
        for hard_negatives in ("batch", "own", "none")
        for mask in (False, True)
    }
    assert len(losses) == 6


def test_step_equals_its_rows_by_hand() -> None:
    """Row by row in plain Python: every row's negatives seen by all, no mask."""
    embedding_TD = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).double()
    docs = embedding_TD[POSITIVES + NEGATIVES]
    losses = [
        -torch.log_softmax(docs @ embedding_TD[query] / 0.5, dim=0)[i]
        for i, query in enumerate(QUERIES)
    ]
    loss, _ = loss_of(gather("batch"), embedding_TD)
    assert relative_error(loss, torch.stack(losses).mean()) <= 1e-12


def test_candidates_move_with_the_step() -> None:
    moved = candidates_of(gather("own", mask_duplicates=True)).to(torch.device("cpu"))
    assert isinstance(moved, Candidates)
    moved.validate(5, 11)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("softmaxes", ["one_way", "symmetric", "gte"])
@pytest.mark.parametrize("embedding_dtype", ["fp16", "split-bf16"])
def test_the_loss_of_a_step_waits_for_no_gpu(
    embedding_dtype: str, softmaxes: Any, learned: bool
) -> None:
    """Embeddings on the meta device stand for those on a GPU."""
    texts = gather("own", mask_duplicates=True)
    section = LossSection(softmaxes=softmaxes, hardness=2.0, false_negative_margin=0.1)
    temperature = LearnedTemperature().to("meta") if learned else None
    emb_SD = torch.empty(len(texts.place_S), 6, dtype=DTYPES[embedding_dtype], device="meta")
    loss = partial(_info_nce, candidates_of(texts), section, temperature, embedding_dtype)
    with recorded() as kernels, HostWaits() as waits:
        for _ in range(2):  # again, as after memory ran out
            report = loss(emb_SD, torch.empty_like(emb_SD, dtype=torch.float32), 2**20)
    assert report.loss.device == emb_SD.device
    assert sum(kernel.count for kernel in kernels.values()) >= 4
    assert not waits.found


@pytest.mark.parametrize(("most", "width"), [(0, 0), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_keys_come_in_few_widths(most: int, width: int) -> None:
    """A GPU compiles the loss for each of them."""
    filler_M = np.array([7, 8])
    place, value = np.zeros(most, np.int64), np.arange(most)
    key_MK = batches._as_matrix(place, value, filler_M=filler_M)
    assert key_MK.shape == (2, width)
    assert key_MK[0].tolist() == [*range(most), *[7] * (width - most)]
    assert set(key_MK[1].tolist()) <= {8}
