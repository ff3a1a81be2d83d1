"""Which layers an adapter is put on, its dropout, and what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_cft.model.adapter import attach_adapter, target_modules, trainable_parameters
from lowmem_cft.model.backbone import load_backbone
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
