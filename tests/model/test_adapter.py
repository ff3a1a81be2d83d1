"""Which layers an adapter is put on, its dropout, and what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.model.adapter import attach_adapter, target_modules, trainable_parameters
from lowmem_cft.model.backbone import load_backbone
from lowmem_cft.model.configs import disable_base_dropout
from lowmem_cft.model.dropout import DropoutClock, IdentityDropout
from lowmem_cft.recipe.schema import LoraSection, ModelSection
from tiny import FAMILIES, SIZES

CPU = torch.device("cpu")


def load(folder: Path, **values: Any) -> Any:
    return load_backbone(ModelSection(id=str(folder), **values), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_table_is_never_upcast(folders: dict[str, Path], family: str) -> None:
    backbone = load(folders[family], dtype="bf16")
    model = attach_adapter(backbone.model, LoraSection(rank=4), DropoutClock(), seed=0)
    assert backbone.model.get_input_embeddings().weight.dtype == torch.bfloat16
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16, torch.uint8}
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
    ],
    ids=["all-linear", "attention", "mlp", "names"],
)
def test_targets(tiny_folder: Path, targets: Any, wanted: set[str]) -> None:
    model = load(tiny_folder).model
    names = target_modules(model, targets)
    assert {name.rpartition(".")[2] for name in names} == wanted
    assert len(names) == len(wanted) * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["attention", "mlp"])
def test_presets_of_targets_exist_in_every_family(
    folders: dict[str, Path], family: str, targets: str
) -> None:
    model = load(folders[family]).model
    chosen = target_modules(model, targets)
    assert 0 < len(chosen) < len(target_modules(model, "all-linear"))


def test_unknown_target_lists_those_there(tiny_folder: Path) -> None:
    model = load(tiny_folder).model
    with pytest.raises(ValueError, match=r"got 'q_prj'.*down_proj, gate_proj.*q_proj"):
        target_modules(model, ["q_prj"])


def test_dropout_modules_are_ours_and_named_apart(tiny_folder: Path) -> None:
    model = attach_adapter(
        load(tiny_folder).model, LoraSection(rank=2, dropout=0.1), DropoutClock(), seed=0
    )
    ours = [m for m in model.modules() if isinstance(m, IdentityDropout)]
    assert len(ours) == 7 * SIZES["num_hidden_layers"]
    assert len({m.module_key for m in ours}) == len(ours)
    assert not any(type(m) is torch.nn.Dropout and m.p for m in model.modules())


def test_same_seed_same_adapter(tiny_folder: Path) -> None:
    section = LoraSection(rank=2, init="gaussian")
    states = [
        attach_adapter(load(tiny_folder).model, section, DropoutClock(), seed=seed).state_dict()
        for seed in (1, 1, 2)
    ]
    keys = [key for key in states[0] if "lora_A" in key]
    assert keys
    assert all(torch.equal(states[0][key], states[1][key]) for key in keys)
    assert not any(torch.equal(states[0][key], states[2][key]) for key in keys)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_orthogonal_adapters_begin_at_zero(tiny_folder: Path, quantization: str) -> None:
    """B A is zero though neither is; also on 4-bit weights, whose dtype no adapter has."""
    model = load(tiny_folder, quantization=quantization, dtype="fp32").model
    section = LoraSection(rank=4, init="orthogonal")
    adapted = attach_adapter(model, section, DropoutClock(), seed=0)
    layer = adapted.get_base_model().layers[0].mlp.up_proj
    a_RF, b_GR = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    assert a_RF.dtype == b_GR.dtype == torch.float32
    assert float(a_RF.abs().max()) > 0.01
    assert float(b_GR.abs().max()) > 0.01
    assert float((b_GR @ a_RF).abs().max()) < 1e-6
    assert adapted.peft_config["default"].init_lora_weights is True, "peft would do it again"


def test_gpt2_is_adapted() -> None:
    """Its linear layers are transformers' own `Conv1D`, with transposed weights."""
    from transformers import AutoModel, GPT2Config

    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    disable_base_dropout(config)
    model: Any = AutoModel.from_config(config)
    names = {name.partition(".")[2][2:] for name in target_modules(model, "all-linear")}
    assert names == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    adapted = attach_adapter(model.double(), LoraSection(rank=2), DropoutClock(), seed=0)
    parameters = trainable_parameters(adapted)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    assert len(parameters) == 2 * 2 * len(names)
    ids, found = torch.tensor([[5, 6, 7, 2]]), []
    for training in (True, False):  # ours, and peft's own
        adapted.train(training)
        loss = adapted(input_ids=ids).last_hidden_state.square().mean()
        found.append(torch.autograd.grad(loss, parameters))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
