"""The base model's configuration: dropout off, top layers dropped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.configs import (
    config_without_weights,
    disable_base_dropout,
    disable_layer_dropout,
    load_config,
)
from lowmem_cft.recipe.schema import ModelSection
from tiny import SIZES, save_tiny, tiny_config

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


def random_in_training(model: Any) -> bool:
    model.train()
    ids_1T = torch.tensor([[5, 6, 7, 2]])
    state = torch.get_rng_state()
    first, second = (model(input_ids=ids_1T)[0] for _ in range(2))
    assert not model.training or torch.isfinite(first).all()
    drew = not torch.equal(torch.get_rng_state(), state)
    return drew or not torch.equal(first, second)


def _widths(**values: Any) -> dict[str, Any]:
    return {**SIZES, "intermediate_size": 128, **values}


RATES: dict[str, Any] = {
    "BioGptConfig": _widths(),
    "BertConfig": _widths(),
    "ModernBertConfig": _widths(attention_dropout=0.1, mlp_dropout=0.1, embedding_dropout=0.1),
    "DistilBertConfig": {**SIZES, "dim": 64, "n_layers": 2, "n_heads": 4},
    "BloomConfig": _widths(hidden_dropout=0.1, attention_dropout=0.1),
    "MixtralConfig": _widths(num_key_value_heads=4, router_jitter_noise=0.1, head_dim=16),
}


@pytest.mark.parametrize("maker", RATES)
def test_no_rate_is_left_in_any_configuration(maker: str) -> None:
    import transformers as t

    config = getattr(t, maker)(**RATES[maker])
    assert random_in_training(t.AutoModel.from_config(copy.deepcopy(config))), "nothing is tested"
    disable_base_dropout(config)
    model = t.AutoModel.from_config(config)
    if maker != "MixtralConfig":  # noise is not a rate of dropout, and is off in the layers alone
        assert not random_in_training(model) or hasattr(model, "layerdrop")
    disable_layer_dropout(model)
    first, second = (model(input_ids=torch.tensor([[5, 6, 7, 2]]))[0] for _ in range(2))
    assert model.training
    assert torch.equal(first, second)


def test_parts_of_a_configuration_are_configurations() -> None:
    import transformers as t

    config = t.Gemma3Config(text_config={"attention_dropout": 0.1})
    config.vision_config.attention_dropout = 0.2
    disable_base_dropout(config)
    assert config.text_config.attention_dropout == 0
    assert config.vision_config.attention_dropout == 0


def test_rates_that_layers_have_of_their_own_are_set_to_0() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Dropout(0.2)
            self.attention = torch.nn.MultiheadAttention(8, 2, dropout=0.3)
            self.drop_path_rate, self.token_dropout, self.p = 0.1, True, 0.5

    disable_layer_dropout(layer := Layer())
    assert (layer.inner.p, layer.attention.dropout, layer.drop_path_rate) == (0.0, 0.0, 0.0)
    assert (layer.token_dropout, layer.p) == (True, 0.5), "these are no rates"


@pytest.mark.parametrize(
    ("maker", "kind"), [("T5Config", "t5"), ("BartConfig", "bart"), ("MT5Config", "mt5")]
)
def test_encoder_decoders_are_refused_by_their_configuration_alone(
    maker: str, kind: str, tmp_path: Path
) -> None:
    import transformers as t

    getattr(t, maker)().save_pretrained(tmp_path)
    for find in (config_without_weights, lambda section: load_config(section, section.id)):
        with pytest.raises(ValueError, match=rf"is an encoder-decoder \({kind}\), .*name a decod"):
            find(ModelSection(id=str(tmp_path)))


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
