"""Vectors that outlive a stop, and are of their model and texts alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lowmem_cft.inference.embed import Vectors
from lowmem_cft.inference.kept_vectors import KeptVectors


class Counting:
    """Embeds a text as its length, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.calls += 1
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)


def test_vectors_are_given_again_to_the_same_model_and_texts(tmp_path: Path) -> None:
    embed = Counting()
    first = KeptVectors(embed, tmp_path / "kept", {"model": "m"})
    vectors = first(["a", "bcd"])
    assert vectors.tolist() == [[1, 1], [3, 1]]
    again = KeptVectors(embed, tmp_path / "kept", {"model": "m"})
    assert np.array_equal(again(["a", "bcd"]), vectors)
    assert embed.calls == 1
    assert again(["bcd", "a"]).tolist() == [[3, 1], [1, 1]]
    assert embed.calls == 2


def test_those_of_another_model_go(tmp_path: Path) -> None:
    embed = Counting()
    KeptVectors(embed, tmp_path / "kept", {"model": "m"})(["a"])
    other = KeptVectors(embed, tmp_path / "kept", {"model": "n"})
    assert list((tmp_path / "kept").iterdir()) == []
    other(["a"])
    assert embed.calls == 2
    other.remove()
    assert not (tmp_path / "kept").exists()
