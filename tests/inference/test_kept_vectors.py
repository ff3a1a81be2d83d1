"""What was embedded before a stop is given again, and nothing that depends on something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lowmem_cft.inference.embed import Vectors
from lowmem_cft.inference.kept_vectors import KeptVectors

TEXTS = ["a cat", "a dog ran", "rain"]


class Counting:
    """Embeds a text as its length and the number of its words, and counts its calls."""

    calls = 0

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.calls += 1
        return np.array([[len(text), len(text.split())] for text in texts], dtype=np.float32)


def test_given_again_after_a_stop(tmp_path: Path) -> None:
    embed, folder = Counting(), tmp_path / "vectors"
    first = KeptVectors(embed, folder, {"model": "a"})(TEXTS)
    again = KeptVectors(embed, folder, {"model": "a"})(TEXTS)
    assert embed.calls == 1
    assert again.dtype == np.float32
    assert np.array_equal(first, again)
    assert again.tolist() == [[5, 2], [9, 3], [4, 1]]


def test_other_texts_and_another_order_are_embedded(tmp_path: Path) -> None:
    embed = Counting()
    kept_vectors = KeptVectors(embed, tmp_path / "vectors", {"model": "a"})
    for texts in (TEXTS, TEXTS[::-1], TEXTS[:1], TEXTS):
        assert kept_vectors(texts)[:, 0].tolist() == [len(text) for text in texts]
    assert embed.calls == 3


def test_those_of_another_model_are_removed(tmp_path: Path) -> None:
    embed, folder = Counting(), tmp_path / "vectors"
    KeptVectors(embed, folder, {"model": "a"})(TEXTS)
    (old,) = folder.iterdir()
    other = KeptVectors(embed, folder, {"model": "b"})
    assert not old.exists()
    other(TEXTS)
    assert embed.calls == 2


def test_half_a_file_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed, folder = Counting(), tmp_path / "vectors"
    save = np.save

    def stopped(stream: object, vectors: Vectors) -> None:
        save(stream, vectors[:1])
        raise KeyboardInterrupt

    kept_vectors = KeptVectors(embed, folder, {"model": "a"})
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            kept_vectors(TEXTS)
    assert len(kept_vectors(TEXTS)) == 3
    assert embed.calls == 2


def test_removed_when_they_have_served(tmp_path: Path) -> None:
    kept_vectors = KeptVectors(Counting(), tmp_path / "vectors", {})
    kept_vectors(TEXTS)
    kept_vectors.remove()
    assert not (tmp_path / "vectors").exists()
    kept_vectors.remove()
