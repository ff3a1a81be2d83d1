"""Embeddings stand in every slot of their text, and gradients are summed over them."""

from __future__ import annotations

import pytest
import torch

from lowmem_cft.gradient.embedding_cache import EmbeddingCache, Slots

PLACE_S = torch.tensor([2, 0, 1, 0, 3, 0, 2])


def filled(dtype: str, emb_PD: torch.Tensor, *, offload: bool = False) -> EmbeddingCache:
    cache = EmbeddingCache(Slots(PLACE_S), dtype, offload=offload)
    for place_B in (torch.tensor([3, 0]), torch.tensor([1, 2])):
        cache.write(place_B, emb_PD[place_B].requires_grad_())
    return cache


@pytest.mark.parametrize("offload", [False, True])
def test_a_text_is_written_to_all_of_its_slots(offload: bool) -> None:
    emb_PD = torch.randn(4, 3)
    emb_SD, d_emb_SD = filled("fp32", emb_PD, offload=offload).for_loss()
    assert torch.equal(emb_SD, emb_PD[PLACE_S])
    assert not emb_SD.requires_grad
    assert d_emb_SD.shape == emb_SD.shape


def test_the_gradient_of_a_text_is_the_sum_over_its_slots() -> None:
    cache = filled("fp32", torch.randn(4, 3))
    _, d_emb_SD = cache.for_loss()
    d_emb_SD.copy_(torch.randn(7, 3))
    cache.keep_gradient(d_emb_SD)
    summed_PD = torch.zeros(4, 3).index_add_(0, PLACE_S, d_emb_SD)
    for place_B in (torch.tensor([0, 1, 2, 3]), torch.tensor([2]), torch.tensor([3, 0])):
        torch.testing.assert_close(cache.gradient(place_B), summed_PD[place_B])


@pytest.mark.parametrize(
    ("name", "given", "held", "of_gradient"),
    [
        ("fp32", torch.float32, torch.float32, torch.float32),
        ("fp32", torch.float64, torch.float64, torch.float64),
        ("fp32", torch.bfloat16, torch.float32, torch.float32),
        ("split-bf16", torch.float32, torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16, torch.float32),
        ("fp16", torch.bfloat16, torch.float16, torch.float32),
    ],
)
def test_dtypes(name: str, given: torch.dtype, held: torch.dtype, of_gradient: torch.dtype) -> None:
    emb_PD = torch.randn(4, 3).to(given)
    emb_SD, d_emb_SD = filled(name, emb_PD).for_loss()
    assert (emb_SD.dtype, d_emb_SD.dtype) == (held, of_gradient)
    assert torch.equal(emb_SD, emb_PD.to(held)[PLACE_S])


def test_every_text_has_a_slot() -> None:
    with pytest.raises(AssertionError, match="has no slot"):
        Slots(torch.tensor([0, 2, 2]))
