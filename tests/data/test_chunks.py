"""Texts are cut into chunks of least cost, and padded on either side."""

from __future__ import annotations

import csv
import gzip
import itertools
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowmem_cft.data.chunks import TokenBatch, chunk_by_tokens, pad, token_positions
from lowmem_cft.data.tokens import TokenStore

Lengths = npt.NDArray[np.int64]


def cost_of(chunks: Sequence[Lengths], lengths: Lengths, chunk_cost: int) -> int:
    widths = [max(1, int(lengths[chunk].max())) for chunk in chunks]
    return sum(len(c) * width + chunk_cost for c, width in zip(chunks, widths, strict=True))


def padded_tokens(chunks: Sequence[Lengths], lengths: Lengths) -> int:
    return cost_of(chunks, lengths, 0)


def least_cost(lengths: Lengths, budget: int, chunk_cost: int) -> int:
    """Over every way to cut the texts, longest first, into chunks within the budget."""
    longest_first: list[int] = sorted(lengths.tolist(), reverse=True)
    costs = []
    for cuts in itertools.product([False, True], repeat=len(longest_first) - 1):
        ends = [*(i + 1 for i, cut in enumerate(cuts) if cut), len(longest_first)]
        parts = [longest_first[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if all(len(part) == 1 or len(part) * part[0] <= budget for part in parts):
            costs.append(sum(len(part) * part[0] + chunk_cost for part in parts))
    return min(costs)


def realistic_lengths(num_texts: int, seed: int = 0) -> Lengths:
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(3, 0.6, num_texts), 1, 128).astype(np.int64)


@pytest.mark.parametrize("chunk_cost", [0, 1, 5, 32])
def test_chunks_cost_least(chunk_cost: int) -> None:
    draw = np.random.default_rng(chunk_cost)
    num_cut = 0
    for _ in range(150):
        lengths = draw.integers(1, 15, draw.integers(1, 9))
        budget = int(draw.integers(5, 60))
        chunks = chunk_by_tokens(lengths, budget, chunk_cost)
        num_cut += 1 < len(chunks) < len(lengths)
        wanted = least_cost(lengths, budget, chunk_cost)
        assert cost_of(chunks, lengths, chunk_cost) == wanted, (lengths.tolist(), budget)
    assert num_cut > 20


def test_a_chunk_may_end_inside_a_run_of_equal_lengths() -> None:
    lengths = np.array([5, 2, 2, 1, 5, 7])
    chunks = chunk_by_tokens(lengths, 20, chunk_cost=32)
    assert [lengths[chunk].tolist() for chunk in chunks] == [[7, 5], [5, 2, 2, 1]]


@pytest.mark.parametrize("chunk_cost", [0, 32, 10**6])
@pytest.mark.parametrize("budget", [1, 100, 1024, 10**6])
def test_chunks_hold_every_text_once_longest_first(budget: int, chunk_cost: int) -> None:
    lengths = realistic_lengths(700)
    lengths[:5] = 0
    chunks = chunk_by_tokens(lengths, budget, chunk_cost)
    flat = np.concatenate(chunks)
    assert sorted(flat.tolist()) == list(range(700))
    assert bool((np.diff(lengths[flat]) <= 0).all())
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * lengths[chunk].max() <= budget
    assert all(chunk.dtype == np.int64 for chunk in chunks)


def test_a_text_beyond_the_budget_is_alone() -> None:
    lengths = np.array([3, 50, 3, 40])
    chunks = [chunk.tolist() for chunk in chunk_by_tokens(lengths, 10)]
    assert chunks == [[1], [3], [0, 2]]


def test_no_texts_no_chunks() -> None:
    assert chunk_by_tokens(np.empty(0, dtype=np.int64), 100) == []


@pytest.mark.parametrize("num_texts", [768, 5000])
def test_padding_is_a_small_share(num_texts: int) -> None:
    lengths = realistic_lengths(num_texts)
    chunks = chunk_by_tokens(lengths, 4096)
    padded, real = padded_tokens(chunks, lengths), int(lengths.sum())
    assert padded <= 1.06 * real
    unsorted = np.array_split(np.arange(num_texts), len(chunks))
    assert padded_tokens(unsorted, lengths) > 2 * real, "these lengths need no sorting"


def test_chunk_cost_trades_padding_for_chunks() -> None:
    lengths = realistic_lengths(300)
    plans = [chunk_by_tokens(lengths, 2048, cost) for cost in (0, 8, 32, 128, 10**6)]
    counts = [len(plan) for plan in plans]
    padded = [padded_tokens(plan, lengths) for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert padded == sorted(padded)
    assert len(set(counts)) == len(set(padded)) == 5
    assert padded[0] == lengths.sum()
    greedy, left = 0, sorted(lengths.tolist(), reverse=True)
    while left:
        left = left[max(1, 2048 // left[0]) :]
        greedy += 1
    assert counts[-1] == greedy


def test_chunks_are_the_same_in_two_runs() -> None:
    lengths = realistic_lengths(300)
    first, second = (chunk_by_tokens(lengths, 512) for _ in range(2))
    assert [chunk.tolist() for chunk in first] == [chunk.tolist() for chunk in second]
    # equal lengths keep their order
    for chunk_cost in (0, 32):
        equal = chunk_by_tokens(np.full(10, 4), 12, chunk_cost)
        assert np.concatenate(equal).tolist() == list(range(10))
        assert sorted(map(len, equal)) == [1, 3, 3, 3]


STORE = TokenStore.from_lists([[5, 6], [7], [8, 9, 10], [11, 12, 13, 14]])


def test_pad_right() -> None:
    batch = pad(STORE, np.array([2, 0, 1]), pad_id=3)
    assert batch.ids_BT.tolist() == [[8, 9, 10], [5, 6, 3], [7, 3, 3]]
    assert batch.mask_BT.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert (batch.ids_BT.dtype, batch.mask_BT.dtype) == (torch.int64, torch.bool)


def test_pad_left() -> None:
    batch = pad(STORE, np.array([2, 0, 1]), pad_id=3, side="left")
    assert batch.ids_BT.tolist() == [[8, 9, 10], [3, 5, 6], [3, 3, 7]]
    assert batch.mask_BT.int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_a_text_may_hold_the_padding_token() -> None:
    batch = pad(STORE, np.array([0, 1]), pad_id=6)
    assert batch.mask_BT.int().tolist() == [[1, 1], [1, 0]]


def test_batch_moves() -> None:
    batch = pad(STORE, np.array([0, 1]), pad_id=3).to(torch.device("meta"))
    assert isinstance(batch, TokenBatch)
    assert batch.ids_BT.device.type == batch.mask_BT.device.type == "meta"


def test_positions_start_at_the_first_real_token() -> None:
    left = pad(STORE, np.array([2, 0, 1]), pad_id=3, side="left").mask_BT
    right = pad(STORE, np.array([2, 0, 1]), pad_id=3).mask_BT
    assert token_positions(left).dtype == torch.int64
    assert token_positions(left).tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 0]]
    for mask_BT in (left, right):
        positions = [
            row[real].tolist() for row, real in zip(token_positions(mask_BT), mask_BT, strict=True)
        ]
        assert positions == [[0, 1, 2], [0, 1], [0]]


@pytest.mark.parametrize("chunk_cost", [32, 512])  # a CPU's, a GPU's
def test_padding_of_real_text_is_small(data_folder: Path, chunk_cost: int) -> None:
    """Logical batch 1024, budget 2048, words and marks for tokens: at most 5 % padding."""
    with gzip.open(data_folder / "nli" / "nli_triplets.tsv.gz", "rt", encoding="utf-8") as file:
        rows = list(islice(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1024))
    texts = [row[key] for row in rows for key in ("anchor", "positive", "negative")]
    lengths = np.array([len(re.findall(r"\w+|[^\w\s]", text)) + 1 for text in texts])
    assert len(lengths) == 3072
    chunks = chunk_by_tokens(lengths, 2048, chunk_cost)
    padded = sum(len(chunk) * lengths[chunk].max() for chunk in chunks)
    assert padded <= 1.05 * lengths.sum()


def test_left_padding_is_moved_to_the_right() -> None:
    store = TokenStore.from_lists([[5], [6, 3, 7, 8], [9, 4]])
    right, left = (pad(store, np.arange(3), 3, side) for side in ("right", "left"))  # type: ignore[arg-type]
    moved = left.padded_right()
    assert moved.right_padded
    assert torch.equal(moved.ids_BT, right.ids_BT)
    assert torch.equal(moved.mask_BT, right.mask_BT)
    assert right.padded_right() is right
