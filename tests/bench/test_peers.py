"""Our base and adapter in sentence-transformers: the same tokens, or an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.peers import add_adapter, base_in_st, check_tokens
from lowmem_cft.data.tokens import query_format
from lowmem_cft.model.backbone import find_backbone
from running import MakeRecipe

pytest.importorskip("sentence_transformers", minversion="6.0")
TEXTS = ["the cat sat on the mat", "a dog ran", "sad"]


def test_same_tokens_and_layers_or_an_error(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    section = {"quantization": "none", "keep_layers": 2}
    recipe = make_recipe(text={"template": "{text} is"}, model=section)
    source = find_backbone(recipe.model)
    text_format, cpu = query_format(recipe), torch.device("cpu")
    model = base_in_st(recipe.model, source, text_format, cpu, tmp_path / "st")
    assert model[0].auto_model.config.num_hidden_layers == 2
    check_tokens(model, source.tokenizer, recipe, TEXTS)
    other = make_recipe(text={"template": "{text} was"})
    with pytest.raises(RuntimeError, match="other tokens for 'the cat sat on the mat'"):
        check_tokens(model, source.tokenizer, other, TEXTS)
    add_adapter(model, recipe)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B of every linear layer
