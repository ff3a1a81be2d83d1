"""Texts in, vectors out: each distinct text once, in order, and what texts begin with in common."""

from __future__ import annotations

import numpy as np
import pytest

from counted import Counted
from lowmem_cft.data.tokens import TextFormat
from lowmem_cft.inference.embed import embed_texts
from tiny import tiny_tokenizer

FORMAT = TextFormat("{text}", append_eos=True, max_tokens=32)
TEXTS = ["the cat sat", "a dog ran over the river", "sad", "two big red house in the rain ."]


def test_each_distinct_text_once_and_in_order(encoder: Counted) -> None:
    tokenizer, progress = tiny_tokenizer(), []
    alone = {text: embed_texts(encoder, tokenizer, [text], FORMAT)[0] for text in TEXTS}
    assert min(np.abs(alone["sad"] - alone[text]).max() for text in TEXTS if text != "sad") > 0.01
    order = np.random.default_rng(0).integers(0, len(TEXTS), 30)
    texts = [TEXTS[i] for i in order]
    assert set(texts) == set(TEXTS)
    for budget in (1, 9, 16384):
        encoder.texts = 0
        progress.clear()
        vectors = embed_texts(
            encoder, tokenizer, texts, FORMAT, token_budget=budget, on_progress=progress.append
        )
        assert encoder.texts == sum(progress) == len(TEXTS)
        assert vectors.dtype == np.float32
        for text, vector in zip(texts, vectors, strict=True):
            assert float(np.abs(vector - alone[text]).max()) < 1e-6
            assert np.array_equal(vector, vectors[texts.index(text)])


def test_no_texts(encoder: Counted) -> None:
    with pytest.raises(ValueError, match="no texts"):
        embed_texts(encoder, tiny_tokenizer(), [], FORMAT)
