"""A model's name becomes what embeds texts, with vectors of length 1 or as they come."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_cft.inference import embedder
from lowmem_cft.inference.embedder import (
    is_sentence_transformer,
    load_embedder,
    normalized_or_not,
)
from lowmem_cft.inference.loading import Embedder
from lowmem_cft.model.exported import RECORD
from lowmem_cft.model.sources import EMBEDDED
from peer_models import put_on_hub

TEXTS = ["the cat sat", "a dog ran in the house", "rain"]


def load(folder: Path, *overrides: str, **options: Any) -> Any:
    given = ["model.dtype=fp32", *overrides]
    return load_embedder(
        str(folder), torch.device("cpu"), lambda text: None, overrides=given, **options
    )


def lengths(vectors: Any) -> Any:
    return np.linalg.norm(vectors, axis=1)


def test_normalisation_is_asked_of_an_embedder_and_changes_it_not(tiny_folder: Path) -> None:
    unit_length = load(tiny_folder, "embedding.normalize=true")
    raw = normalized_or_not(unit_length, False)(TEXTS)
    assert (abs(lengths(raw) - 1) > 0.01).all()
    assert lengths(unit_length.embed(TEXTS)) == pytest.approx(np.ones(3), abs=1e-5)
    unit = normalized_or_not(unit_length, None)(TEXTS)
    assert unit == pytest.approx(raw / lengths(raw)[:, None], abs=1e-5)


@pytest.mark.parametrize("own", ["true", "false"])
@pytest.mark.parametrize("normalize", [True, False, None])
def test_normalisation_of_a_loaded_model(
    tiny_folder: Path, own: str, normalize: bool | None
) -> None:
    loaded = load(tiny_folder, f"embedding.normalize={own}", normalize=normalize)
    of_length_1 = own == "true" if normalize is None else normalize
    assert (abs(lengths(loaded.embed(TEXTS)) - 1) < 1e-4).all() == of_length_1


def test_float32_reaches_the_embedder(tiny_folder: Path) -> None:
    narrow, wide = (load(tiny_folder, "model.dtype=bf16", float32=on) for on in (False, True))
    assert isinstance(wide, Embedder)
    assert (narrow.float32, wide.float32) == (False, True)
    apart = abs(narrow.embed(TEXTS) - wide.embed(TEXTS)).max()
    assert 0 < apart < 0.1


def test_whose_folder_it_is(tmp_path: Path) -> None:
    assert not is_sentence_transformer(str(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps([]))
    assert is_sentence_transformer(str(tmp_path))
    for given in ({"recipe_name": "demo"}, {}):
        with pytest.raises(ValueError, match="leave out `recipe` and `overrides`"):
            load(tmp_path, **given)
    (tmp_path / RECORD).write_text("{}")
    assert not is_sentence_transformer(str(tmp_path))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_sentence_transformer_embeds_alike_by_folder_and_by_hub_id(
    peer_folder: Path, hub: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    put_on_hub(hub, "org/peer", peer_folder)
    reference = SentenceTransformer(str(peer_folder), device="cpu")
    encode = {
        None: reference.encode,
        "query": reference.encode_query,
        "document": reference.encode_document,
    }
    texts = [*TEXTS, TEXTS[0]]
    for name in (str(peer_folder), "org/peer"):
        loaded = load_embedder(name, torch.device("cpu"), lambda text: None)
        done: list[int] = []
        for role in encode:
            vectors = loaded.embed(texts, role=role, on_progress=done.append)
            assert vectors == pytest.approx(encode[role](texts), abs=1e-6)
        assert sum(done) == 3 * len(encode)
        apart = loaded.embed(texts, role="query") - loaded.embed(texts, role="document")
        assert abs(apart).max() > 0.01


def test_many_texts_keep_their_order(peer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_embedder(str(peer_folder), torch.device("cpu"), lambda text: None)
    whole = loaded.embed(TEXTS)
    monkeypatch.setattr(embedder, "_SLICE", 1)
    done: list[int] = []
    assert loaded.embed(TEXTS, on_progress=done.append) == pytest.approx(whole, abs=1e-6)
    assert done == [1, 1, 1]


def test_a_hub_that_cannot_be_asked_is_said(
    hub: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert not is_sentence_transformer("org/model", said.append)
    assert not said
    put_on_hub(hub, "org/model", tiny_folder)
    assert not is_sentence_transformer("org/model", said.append)
    assert "taken for a bare model: org/model has no modules.json" in said[0]
    asked: list[str] = []

    def answer(name: str, file: str) -> bool:
        asked.append(name)
        return name == "org/model"

    monkeypatch.setattr("huggingface_hub.file_exists", answer)
    assert is_sentence_transformer("org/model")
    assert not is_sentence_transformer("org/other")
    for local in (EMBEDDED, "no such name", str(tiny_folder), "./gone", "a/b/c"):
        assert not is_sentence_transformer(local)
    assert asked == ["org/model", "org/other"]


def test_the_hub_is_asked_for_a_newer_version_only_if_it_answers(
    peer_folder: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_hub(hub, "org/peer", peer_folder)
    assert Path(embedder._found("org/peer")).is_relative_to(hub)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda name, file: True)
    assert embedder._found("org/peer") == "org/peer"
    assert embedder._found(str(peer_folder)) == str(peer_folder)


def test_modules_that_need_remote_code_are_refused(tmp_path: Path, peer_folder: Path) -> None:
    shutil.copytree(peer_folder, tmp_path / "model")
    modules = tmp_path / "model" / "modules.json"
    listed = json.loads(modules.read_text())
    listed[1]["type"] = "own_code.Pooling"
    modules.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="runs no remote code here, cannot load it"):
        load_embedder(str(tmp_path / "model"), torch.device("cpu"), lambda text: None)


def test_the_role_is_the_templates(tiny_folder: Path) -> None:
    loaded = load(
        tiny_folder, "text.template=the big {text}", "text.document_template=a small {text}"
    )
    query, document = (loaded.embed(TEXTS, role=role) for role in ("query", "document"))
    assert np.array_equal(loaded.embed(TEXTS), query)
    assert abs(query - document).max() > 0.01
    swapped = load(tiny_folder, "text.template=a small {text}").embed(TEXTS)
    assert document == pytest.approx(swapped, abs=1e-5)
    plain = load(tiny_folder)
    assert np.array_equal(plain.embed(TEXTS, role="query"), plain.embed(TEXTS, role="document"))


def test_there_are_two_roles(tiny_folder: Path, peer_folder: Path) -> None:
    for loaded in (
        load(tiny_folder),
        load_embedder(str(peer_folder), torch.device("cpu"), lambda text: None),
    ):
        with pytest.raises(ValueError, match="`role`: got 'passage', wanted query or document"):
            loaded.embed(TEXTS, role="passage")
