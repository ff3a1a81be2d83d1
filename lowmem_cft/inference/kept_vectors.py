"""Embeddings kept on disk while a long evaluation is under way, so that a stop loses one set."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowmem_cft.files import digest, whole_file
from lowmem_cft.inference.embed import Embed, Vectors

_DIGITS = 16


class KeptVectors:
    """An embedder that reads from a folder what it gave for the same texts before.

    Args:
        embed: texts to float32 (texts, D).
        folder: for this alone; takes 4 D bytes a text until it is removed.
        identity: JSON values, all that a vector depends on besides its text. What was kept under
            another identity is removed.
    """

    def __init__(self, embed: Embed, folder: Path, identity: Mapping[str, Any]) -> None:
        self._embed, self._folder = embed, folder
        self._prefix = digest(dict(identity))[:_DIGITS]
        for path in folder.glob("*"):
            if not path.name.startswith(self._prefix):
                path.unlink()

    def __call__(self, texts: Sequence[str]) -> Vectors:
        path = self._folder / f"{self._prefix}-{digest(list(texts))[:_DIGITS]}.npy"
        if path.is_file():
            vectors: Vectors = np.load(path)
            return vectors
        emb_XD = self._embed(texts)
        self._folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, partial.open("wb") as stream:
            np.save(stream, emb_XD)
        return emb_XD

    def remove(self) -> None:
        """Remove the folder, once what its vectors served is written."""
        shutil.rmtree(self._folder, ignore_errors=True)
