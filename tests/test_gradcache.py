"""The chunked gradient equals the plain full-batch one, for every chunking, with dropout too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import FAMILIES, tiny_config
from lowmem_cft.backbone import attach_adapter, disable_base_dropout, set_checkpointing
from lowmem_cft.batch import TokenBatch
from lowmem_cft.dropout import DropoutClock
from lowmem_cft.encoder import Encoder
from lowmem_cft.gradcache import gradcache_step
from lowmem_cft.recipe import LoraSection
from lowmem_cft_kernels import Candidates, info_nce
from lowmem_cft_kernels.reference import info_nce_loss
from numerics import assert_same, compute_norms_in_float64, gradients

NUM_ROWS = 6
NUM_TEXTS = 3 * NUM_ROWS  # anchors, positives, negatives


def make_encoder(family: str, dropout: float, pooling: Any = "eos") -> Encoder:
    from transformers import AutoModel

    torch.manual_seed(1)
    config = tiny_config(family)
    disable_base_dropout(config)
    model = AutoModel.from_config(config).double()
    model.requires_grad_(False)
    compute_norms_in_float64(model)
    clock = DropoutClock(seed=5)
    section = LoraSection(rank=4, dropout=dropout)
    peft_model = attach_adapter(model, section, clock, seed=2)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide errors in the gradient of A
            torch.nn.init.normal_(parameter, std=0.05)
    return Encoder(peft_model, pooling=pooling, normalize=True, clock=clock)


def make_texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 12, (NUM_TEXTS,), generator=generator)
    return [torch.randint(4, 60, (int(n),), generator=generator) for n in lengths]


def batch_of(texts: list[Tensor], places: Tensor) -> TokenBatch:
    chosen = [texts[int(place)] for place in places]
    ids_BT = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=3)
    lengths_B = torch.tensor([len(text) for text in chosen])
    return TokenBatch(ids_BT, torch.arange(ids_BT.shape[1]) < lengths_B[:, None])


def candidates() -> Candidates:
    return Candidates(target_M=torch.arange(NUM_ROWS))


def plain_gradients(encoder: Encoder, texts: list[Tensor]) -> dict[str, Tensor]:
    encoder.model.zero_grad()
    everything = torch.arange(NUM_TEXTS)
    with encoder.training_mode(step=7):
        emb_PD = encoder(batch_of(texts, everything), everything)
        query_MD, doc_ND = emb_PD.split([NUM_ROWS, 2 * NUM_ROWS])
        info_nce_loss(query_MD, doc_ND, candidates(), temperature=0.1).backward()
    return gradients(encoder.model)


def chunked_gradients(
    encoder: Encoder, texts: list[Tensor], forward: list[Tensor], backward: list[Tensor]
) -> dict[str, Tensor]:
    encoder.model.zero_grad()

    def loss(emb_PD: Tensor) -> tuple[Tensor, None]:
        query_MD, doc_ND = emb_PD.split([NUM_ROWS, 2 * NUM_ROWS])
        result = info_nce(query_MD, doc_ND, candidates(), temperature=0.1)
        return torch.cat([result.d_query_MD, result.d_doc_ND]), None

    with encoder.training_mode(step=7):
        gradcache_step(
            lambda place_B: encoder(batch_of(texts, place_B), place_B),
            loss,
            forward_chunks=forward,
            backward_chunks=backward,
            num_texts=NUM_TEXTS,
        )
    return gradients(encoder.model)


ORDER = torch.randperm(NUM_TEXTS, generator=torch.Generator().manual_seed(0))
CHUNKINGS = {
    "one text a chunk": list(ORDER.split(1)),
    "ragged": list(ORDER.split([5, 1, 9, 3])),
    "all in one": [torch.arange(NUM_TEXTS)],
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_equals_plain_step(chunking: str, dropout: float) -> None:
    encoder, texts = make_encoder("llama", dropout), make_texts()
    wanted = plain_gradients(encoder, texts)
    got = chunked_gradients(encoder, texts, CHUNKINGS["ragged"], CHUNKINGS[chunking])
    assert_same(got, wanted, 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_plain_step_in_every_family(family: str) -> None:
    encoder, texts = make_encoder(family, 0.2, pooling="mean"), make_texts()
    wanted = plain_gradients(encoder, texts)
    got = chunked_gradients(encoder, texts, CHUNKINGS["all in one"], CHUNKINGS["ragged"])
    assert_same(got, wanted, 1e-10)


def test_checkpointing_changes_nothing() -> None:
    encoder, texts = make_encoder("llama", 0.3), make_texts()
    wanted = plain_gradients(encoder, texts)
    set_checkpointing(encoder.model, True)
    calls = []
    layer = encoder.model.get_base_model().layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    got = chunked_gradients(encoder, texts, CHUNKINGS["ragged"], CHUNKINGS["ragged"])
    assert len(calls) == 3 * len(CHUNKINGS["ragged"]), "layers were not recomputed"
    assert_same(got, wanted, 1e-10)


def test_dropout_is_active_and_depends_on_the_step() -> None:
    encoder, texts = make_encoder("llama", 0.3), make_texts()
    places = torch.arange(NUM_TEXTS)
    with torch.no_grad():
        still = encoder(batch_of(texts, places), places)
        with encoder.training_mode(step=1):
            first = encoder(batch_of(texts, places), places)
            again = encoder(batch_of(texts, places), places)
        with encoder.training_mode(step=2):
            other = encoder(batch_of(texts, places), places)
    assert torch.equal(first, again)
    assert not torch.allclose(first, still)
    assert not torch.allclose(first, other)


def test_gradient_scale_multiplies() -> None:
    encoder, texts = make_encoder("llama", 0.0), make_texts()
    wanted = {name: 8 * grad for name, grad in plain_gradients(encoder, texts).items()}
    encoder.model.zero_grad()
    emb: list[Tensor] = []

    def loss(emb_PD: Tensor) -> tuple[Tensor, None]:
        emb.append(emb_PD)
        query_MD, doc_ND = emb_PD.split([NUM_ROWS, 2 * NUM_ROWS])
        result = info_nce(query_MD, doc_ND, candidates(), temperature=0.1)
        return torch.cat([result.d_query_MD, result.d_doc_ND]), None

    with encoder.training_mode(step=7):
        gradcache_step(
            lambda place_B: encoder(batch_of(texts, place_B), place_B),
            loss,
            forward_chunks=CHUNKINGS["all in one"],
            backward_chunks=CHUNKINGS["ragged"],
            num_texts=NUM_TEXTS,
            gradient_scale=8.0,
        )
    assert not emb[0].requires_grad
    assert_same(gradients(encoder.model), wanted, 1e-10)
