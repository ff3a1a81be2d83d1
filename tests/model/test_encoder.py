"""An embedding is the text's own: not of its padding, its company or its template's end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bidirectional import BIDIRECTIONAL, build
from lowmem_cft.data.chunks import pad
from lowmem_cft.data.tokens import Ids, TextFormat, tokenize
from lowmem_cft.inference.embed import embed_texts
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import ModelSection
from plain import PAD, make_batch, make_encoder
from tiny import FAMILIES

CPU = torch.device("cpu")

TEXTS = [
    "the cat sat on the mat .",
    "a dog ran",
    "two big red house in the rain and sun over three small blue tree",
    "sad",
]

FORMAT = TextFormat("{text}", append_eos=True, max_tokens=32)


def load(folder: Path, **values: Any) -> Any:
    return load_backbone(ModelSection(id=str(folder), **values), CPU)


@pytest.mark.parametrize("pooling", ["eos", "mean", "weighted-mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_and_company_change_nothing(
    folders: dict[str, Path], family: str, pooling: Any
) -> None:
    backbone = load(folders[family], dtype="fp32")
    encoder = Encoder(backbone.model, pooling=pooling, normalize=True)
    store = tokenize(backbone.tokenizer, TEXTS, FORMAT)
    pad_id = backbone.tokenizer.pad_token_id
    everything = np.arange(len(TEXTS))
    with torch.no_grad():
        right = encoder(pad(store, everything, pad_id))
        left = encoder(pad(store, everything, pad_id, side="left"))
        alone = torch.cat([encoder(pad(store, everything[i : i + 1], pad_id)) for i in everything])
    assert float(right.std(dim=0).max()) > 1e-3, "the texts embed alike: nothing is compared"
    assert float((right - left).abs().max()) < 1e-5
    assert float((right - alone).abs().max()) < 1e-5


def plain_embedding(model: Any, ids_T: Ids, pooling: str) -> torch.Tensor:
    """(H,): of one text by transformers alone, without padding and with a mask that says so."""
    ids_1T = torch.from_numpy(ids_T.astype(np.int64))[None]
    with torch.no_grad():
        hidden_TH = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T))[0][0]
    if pooling == "weighted-mean":
        weight_T = torch.arange(1, len(hidden_TH) + 1, dtype=hidden_TH.dtype)
        return weight_T @ hidden_TH / weight_T.sum()
    read = {"eos": hidden_TH[-1], "cls": hidden_TH[0], "mean": hidden_TH.mean(dim=0)}
    return read[pooling]


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_texts_that_see_all_of_themselves_see_no_padding(family: str) -> None:
    model = build(BIDIRECTIONAL[family]())
    store = make_batch(4, 1, texts=7, longest=14).store
    every = np.arange(len(store))
    assert store.lengths.min() < store.lengths.max()
    for pooling in ("eos", "mean", "weighted-mean", "cls"):
        alone = torch.stack([plain_embedding(model, store[i], pooling) for i in every])
        assert float(alone.std(dim=0).max()) > 0.1, "the texts embed alike: nothing is compared"
        encoder = Encoder(model, pooling=pooling, normalize=False)  # type: ignore[arg-type]
        with torch.no_grad():
            right, left = (encoder(pad(store, every, PAD, side)) for side in ("right", "left"))  # type: ignore[arg-type]
            single = encoder(pad(store, every[:1], PAD))
        for got in (right, left, single):
            assert float((got - alone[: len(got)]).abs().max()) < 1e-10, pooling


def test_cls_of_a_causal_model_reads_nothing() -> None:
    with pytest.raises(ValueError, match=r"pooling: got cls, but LlamaModel is causal: .* to eos"):
        make_encoder("llama", pooling="cls")


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_is_read_at_the_appended_token(folders: dict[str, Path], family: str) -> None:
    backbone = load(folders[family], dtype="fp32", quantization="none")
    tokenizer, eos = backbone.tokenizer, backbone.tokenizer.eos_token_id
    encoder = Encoder(backbone.model, pooling="eos", normalize=False)
    vector = torch.from_numpy(embed_texts(encoder, tokenizer, TEXTS[:1], FORMAT))
    ids = [*tokenizer(TEXTS[0])["input_ids"], eos]
    with torch.no_grad():
        hidden = backbone.model(input_ids=torch.tensor([ids])).last_hidden_state
    assert float((vector - hidden[:, -1]).abs().max()) < 1e-5
    assert float((vector - hidden[:, -2]).abs().max()) > 1e-3


def test_another_normalisation_is_of_the_same_model(tiny_folder: Path) -> None:
    backbone = load(tiny_folder, dtype="fp32", quantization="none")
    encoder = Encoder(backbone.model, pooling="eos", normalize=True)
    plain = encoder.normalizing(False)
    batch = pad(tokenize(backbone.tokenizer, TEXTS, FORMAT), np.arange(len(TEXTS)), 3)
    with torch.no_grad():
        unit, raw = encoder(batch), plain(batch)
    assert float((raw.norm(dim=1) - 1).abs().min()) > 0.1
    torch.testing.assert_close(unit, torch.nn.functional.normalize(raw, dim=1))
    assert torch.equal(encoder(batch), unit), "the first encoder has changed"
    assert plain.model is encoder.model
    encoder.proven_prefix.set(12, 30)
    assert plain.proven_prefix.covers(12, 30), "what one has tried the other need not try"


def test_attention_that_is_no_kernel_of_torchs_is_named(tiny_folder: Path) -> None:
    """flex_attention does not run under a mode that looks at operations."""
    section = ModelSection(
        id=str(tiny_folder), dtype="fp32", quantization="none", attention="flex_attention"
    )
    backbone = load_backbone(section, torch.device("cpu"))
    encoder = Encoder(backbone.model, pooling="mean", normalize=False)
    plain = ModelSection(id=str(tiny_folder), dtype="fp32", quantization="none")
    other = Encoder(
        load_backbone(plain, torch.device("cpu")).model, pooling="mean", normalize=False
    )
    store = tokenize(backbone.tokenizer, TEXTS, FORMAT)
    batch = pad(store, np.arange(len(TEXTS)), 3)
    with torch.no_grad():
        torch.testing.assert_close(encoder(batch), other(batch))
    assert encoder.attention == ["flex_attention"]
