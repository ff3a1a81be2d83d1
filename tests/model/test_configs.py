"""The base model's configuration: dropout off, top layers dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.recipe.schema import ModelSection
from tiny import save_tiny, tiny_config

CPU = torch.device("cpu")


def load(folder: Path, **values: Any) -> Any:
    return load_backbone(ModelSection(id=str(folder), **values), CPU)


def test_keep_layers_equals_the_lower_layers(tiny_folder: Path) -> None:
    whole = load(tiny_folder, dtype="fp32", quantization="none")
    cut = load(tiny_folder, dtype="fp32", quantization="none", keep_layers=2)
    ids = torch.tensor([[5, 6, 7, 2]])
    with torch.no_grad():
        states = whole.model(input_ids=ids, output_hidden_states=True).hidden_states
        wanted = whole.model.norm(states[2])
        got = cut.model(input_ids=ids).last_hidden_state
    assert len(cut.model.layers) == 2
    assert torch.equal(got, wanted)
    assert cut.config_kwargs["num_hidden_layers"] == 2


def test_base_dropout_is_off(tmp_path: Path) -> None:
    config = tiny_config("opt")
    assert config.dropout > 0, "OPT's configuration has dropout: nothing is tested otherwise"
    backbone = load(save_tiny(tmp_path / "opt", "opt"), dtype="fp32", quantization="none")
    backbone.model.train()
    ids = torch.tensor([[5, 6, 7, 2]])
    first, second = (backbone.model(input_ids=ids).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


def test_too_many_layers(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_layers: got 9, but .* has 3 layers"):
        load(tiny_folder, keep_layers=9)


def test_every_presets_model_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of a preset asks nobody."""
    import socket

    from lowmem_cft.model.configs import config_without_weights
    from lowmem_cft.recipe.load import load_recipe, preset_names

    def asked(*address: Any, **options: Any) -> None:
        raise AssertionError("a network is asked")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    names = preset_names()
    assert names
    for name in names:
        config = config_without_weights(load_recipe(name).model)
        assert config.num_hidden_layers > 0
