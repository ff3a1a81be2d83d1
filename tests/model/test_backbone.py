"""The base model as it is loaded: 4-bit weights that train an adapter, and what is an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bidirectional import BIDIRECTIONAL
from lowmem_cft.data.chunks import pad
from lowmem_cft.data.tokens import TextFormat, tokenize
from lowmem_cft.model.adapter import attach_adapter, target_modules, trainable_parameters
from lowmem_cft.model.backbone import find_backbone, load_backbone
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.recipe.schema import LoraSection, ModelSection
from tiny import FAMILIES, tiny_tokenizer

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


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_loads_and_trains_every_lora_weight(folders: dict[str, Path], family: str) -> None:
    backbone = load(folders[family], dtype="fp32")
    embedding = backbone.model.get_input_embeddings().weight
    linear = {type(m).__name__ for m in backbone.model.modules() if "Linear" in type(m).__name__}
    assert linear == {"Linear4bit"}
    assert not any(p.requires_grad for p in backbone.model.parameters())
    num_targets = len(target_modules(backbone.model, "all-linear"))
    model = attach_adapter(backbone.model, LoraSection(rank=4), DropoutClock(), seed=0)
    assert embedding.dtype == torch.float32
    encoder = Encoder(model, pooling="eos", normalize=False)
    store = tokenize(backbone.tokenizer, TEXTS, FORMAT)
    batch = pad(store, np.arange(len(TEXTS)), backbone.tokenizer.pad_token_id)
    parameters = trainable_parameters(model)
    assert len(parameters) == 2 * num_targets
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    # B starts at zero, so A's gradient is zero in the first step and must not be in the second.
    for _ in range(2):
        optimizer.zero_grad()
        with encoder.training_mode(step=0):
            encoder(batch).square().sum().backward()
        optimizer.step()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in zip(names, parameters, strict=True):
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_no_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer that transformers can load"):
        load(tmp_path)


def test_lacking_weights_are_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks 1 weights \(layers.1.mlp.up_proj.weight"):
        load(folder)


@pytest.mark.parametrize("saved_with", [True, False])
def test_a_pooler_is_neither_loaded_nor_missed(saved_with: bool, tmp_path: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_config(BIDIRECTIONAL["bert"](), add_pooling_layer=saved_with)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    backbone = load(tmp_path, quantization="none")
    assert backbone.loader_kwargs["add_pooling_layer"] is False
    assert not any("pooler" in name for name in target_modules(backbone.model, "all-linear"))


def test_tiny_tokenizer_knows_its_words() -> None:
    """The other tests would compare unknown tokens with each other otherwise."""
    ids = tiny_tokenizer()(TEXTS)["input_ids"]
    assert 0 not in [i for row in ids for i in row]


def test_attention_that_is_not_installed_is_refused_before_the_weights(
    folders: dict[str, Path],
) -> None:
    with pytest.raises(
        ValueError, match=r"flash_attention_2, which needs .* model.attention: auto"
    ):
        load(folders["llama"], attention="flash_attention_2")


def test_what_of_a_sentence_transformers_folder_is_not_taken_over(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    said: list[str] = []
    find_backbone(ModelSection(id=str(folder)), said.append)
    assert said == []
    (folder / "modules.json").write_text("[]")
    find_backbone(ModelSection(id=str(folder)), said.append)
    assert "its pooling, prompts and further modules are not taken over" in said[0]
