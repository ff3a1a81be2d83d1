"""Which tokens texts begin with in common, and that running them once changes no embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from counted import Counted
from lowmem_cft.data.tokens import TextFormat, TokenStore, tokenize
from lowmem_cft.inference.embed import embed_texts
from lowmem_cft.inference.prefix_sharing import behind, common_prefix


def store_of(*texts: list[int]) -> TokenStore:
    return TokenStore.from_lists(texts)


@pytest.mark.parametrize(
    ("texts", "num_tokens", "places"),
    [
        ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]], 3, [0, 1, 2]),
        ([[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 6]], 2, [0, 1, 2]),
        ([[7, 7], [1, 2, 3, 5], [1, 2, 3, 6], [1, 2, 3, 4]], 3, [1, 2, 3]),
        ([[1, 9], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]], 3, [1, 2, 3]),
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 9, 9], [1, 8, 8], [1, 7, 7]], 1, range(5)),
        ([[1, 1], [2, 2], [3, 3]], 0, range(3)),
        ([[1, 2, 3, 4]], 0, [0]),
        ([[], [1], [2]], 0, range(3)),
    ],
    ids=["all", "one ends", "one begins otherwise", "one goes off", "few", "none", "one", "empty"],
)
def test_common_prefix(texts: list[list[int]], num_tokens: int, places: Any) -> None:
    shared, place_Q = common_prefix(store_of(*texts))
    assert shared == num_tokens
    assert place_Q.tolist() == list(places)


def test_common_prefix_saves_most_of_any() -> None:
    """Against every prefix there is, among texts of which one in seven goes off somewhere."""
    draw = np.random.default_rng(0)
    most = []
    for _ in range(200):
        path = draw.integers(0, 3, 8)
        texts = []
        for _ in range(int(draw.integers(2, 9))):
            own = np.where(draw.random(8) < 1 / 7, draw.integers(0, 3, 8), path)
            texts.append(own[: draw.integers(1, 9)].tolist())
        saved = {0: 0}
        for text in texts:
            for k in range(1, len(text)):
                same = sum(len(other) > k and other[:k] == text[:k] for other in texts)
                if 2 * same > len(texts):
                    saved[k] = max(saved.get(k, 0), k * (same - 1))
        shared, place_Q = common_prefix(store_of(*texts))
        assert len({tuple(texts[i][:shared]) for i in place_Q}) == 1
        assert all(len(texts[i]) > shared for i in place_Q)
        assert shared * (len(place_Q) - 1) == max(saved.values())
        most.append(shared)
    assert {0, 1, 3, 5} <= set(most)


def test_behind() -> None:
    store = store_of([1, 2, 3, 4], [9], [1, 2, 5], [1, 2, 6, 7, 8])
    own = behind(store, np.array([3, 0, 2]), 2)
    assert [own[i].tolist() for i in range(3)] == [[6, 7, 8], [3, 4], [5]]
    assert own.ids.dtype == store.ids.dtype
    assert own.offsets.dtype == store.offsets.dtype
    assert behind(store, np.arange(4), 0).ids.tolist() == store.ids.tolist()
    assert len(behind(store, np.array([], dtype=np.int64), 2)) == 0


def merging_tokenizer() -> Any:
    """Characters as tokens, but for a quote that merges with an "a" behind it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<s>", "</s>", "<pad>", *'abcdefghij :"', '"a']
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [('"', "a")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_a_tokenizer_that_merges_over_the_seam(encoder: Counted) -> None:
    tokenizer = merging_tokenizer()
    under = TextFormat('abcdef ghij :"{text}" :', append_eos=False, max_tokens=32)
    head = tokenizer(under.head)["input_ids"]
    texts = [f"{first}{'bcdefghij'[:n]}" for first in "bcdeg" for n in range(9)]
    merged = [f"a{text}" for text in texts[::15]]
    texts[7:7] = merged
    store = tokenize(tokenizer, texts, under)
    assert {store[i][len(head) - 1] == head[-1] for i in range(len(texts))} == {True, False}
    num_tokens, place_Q = common_prefix(store)
    assert num_tokens == len(head)
    assert [texts[i] for i in place_Q] == [text for text in texts if text not in merged]

    plain = embed_texts(encoder, tokenizer, texts, under, share_prefix=False)
    tokens, encoder.tokens, encoder.texts = encoder.tokens, 0, 0
    vectors = embed_texts(encoder, tokenizer, texts, under, say=pytest.fail)
    assert encoder.texts == len(texts) + 4, "two are tried, whole and behind the prefix"
    assert encoder.tokens < 0.6 * tokens
    assert float(plain.std(axis=0).max()) > 0.05
    assert float(np.abs(vectors - plain).max()) < 1e-5
