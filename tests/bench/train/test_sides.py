"""The sides of the comparison of trainers."""

from __future__ import annotations

import torch

from bench.gpu import small_models
from bench.train.sides import encoder_around
from lowmem_cft.data.chunks import pad
from lowmem_cft.recipe.load import load_recipe
from plain import PAD


def test_a_model_that_others_train_is_left_as_it_is() -> None:
    """After our warm-up their training forward sees all rows of chunks of any size."""
    from transformers import AutoModel

    recipe = load_recipe("demo")
    assert recipe.embedding.pooling in ("last", "eos")
    torch.manual_seed(0)
    model = AutoModel.from_config(small_models.small_config("llama", True))
    encoder = encoder_around(model, recipe)
    ids_BT = torch.arange(4, 28).view(4, 6)
    model.train()
    wanted = model(ids_BT).last_hidden_state
    batch = small_models.make_batch(6, 14, 12)
    with encoder.training_mode(step=0):
        encoder(pad(batch.store, batch.texts.text_P, PAD))
        got = model(ids_BT).last_hidden_state
    assert torch.equal(got, wanted)
