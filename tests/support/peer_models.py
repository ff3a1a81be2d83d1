"""Models that sentence-transformers wrote, in folders and in a hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tiny import SIZES

PROMPTS = {"query": "the big red ", "document": "a small house "}

_COMMIT = "0" * 40


def save_sentence_transformer(
    folder: Path, backbone: Path, prompts: dict[str, str] = PROMPTS
) -> Path:
    """Mean pooling over a tiny model that lies in a folder; a prompt for each role."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    modules = [Transformer(str(backbone), max_seq_length=32), Pooling(SIZES["hidden_size"], "mean")]
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    model.save(str(folder), create_model_card=False)
    return folder


def put_on_hub(cache: Path, name: str, folder: Path) -> None:
    """Have a hub's cache hold the folder as the model of that name."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / _COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_COMMIT)


@pytest.fixture(scope="session")
def peer_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A model of sentence-transformers' own; skips the test where it is not installed."""
    pytest.importorskip("sentence_transformers")
    return save_sentence_transformer(tmp_path_factory.mktemp("peer") / "model", tiny_folder)
