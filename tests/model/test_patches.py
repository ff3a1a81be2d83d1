"""What is put into other libraries' layers comes out again, and leaves what was there."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowmem_cft.data.chunks import pad
from lowmem_cft.model import attention
from lowmem_cft.model.adapter import replace_dropout
from lowmem_cft.model.dropout import DropoutClock, IdentityDropout
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.lora import use_lean_layers
from lowmem_cft.model.patches import Patches, patched_layers
from lowmem_cft.model.prefix import run_prefix
from plain import make_batch, make_encoder
from tiny import FAMILIES, tiny_config


class Layer(nn.Module):
    """Its forward comes from the class until it is replaced."""

    def forward(self) -> str:
        return "class"


def test_an_attribute_of_the_class_and_one_of_the_object() -> None:
    inherited, own = Layer(), Layer()
    own.forward = forward = lambda: "object"  # type: ignore[method-assign]
    patches = Patches()
    for layer in (inherited, own):
        patches.install(layer, "forward", lambda: "ours")
    assert [layer() for layer in (inherited, own)] == ["ours", "ours"]
    patches.undo()
    assert "forward" not in vars(inherited)
    assert own.forward is forward
    assert not patches


def test_the_latest_comes_out_first() -> None:
    layer, patches = Layer(), Patches()
    for name in ("first", "second"):
        original = layer.forward
        patches.install(layer, "forward", lambda name=name, original=original: name + original())
    assert layer() == "secondfirstclass"
    with patches.lifted():
        assert layer() == "class"
    assert layer() == "secondfirstclass"
    patches.undo()
    assert layer() == "class"


def test_a_block_that_fails_undoes_them() -> None:
    layer = Layer()
    with suppress(KeyError), Patches() as patches:
        patches.install(layer, "forward", lambda: "ours")
        raise KeyError(layer())
    assert layer() == "class"


def test_only_those_of_a_name() -> None:
    layers, patches = nn.ModuleDict({"inside": (original := nn.Dropout(0.1))}), Patches()
    patches.install(layers, "inside", replacement := nn.Identity())
    patches.install(layers, "forward", print)
    patches.undo("forward")
    assert "forward" not in vars(layers)
    assert layers["inside"] is replacement
    assert len(patches) == 1
    patches.undo()
    assert layers["inside"] is original


def test_a_module_comes_back_in_the_mode_of_the_others() -> None:
    layers, patches = nn.ModuleDict({"inside": (original := nn.Dropout(0.1))}), Patches()
    patches.install(layers, "inside", replacement := nn.Identity())
    layers.eval()
    with patches.lifted():
        assert not original.training
        layers.train()
    assert replacement.training
    layers.eval()
    patches.undo()
    assert not original.training


def entries(model: nn.Module) -> dict[tuple[str, str], int]:
    """The identity of every attribute and child of every module, but of the mode it is in."""
    return {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in (vars(module) | module._modules).items()
        if key != "training"
    }


@pytest.mark.parametrize("pooling", ["eos", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_as_the_libraries_made_them(family: str, pooling: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    options = LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear")
    model = get_peft_model(AutoModel.from_config(tiny_config(family)), options)
    patched_layers(model)  # the record itself stands in the model
    unpatched = entries(model)

    clock, patches = DropoutClock(), patched_layers(model)
    replace_dropout(model, 0.2, clock, patches)
    use_lean_layers(model, patches)
    encoder = Encoder(model, pooling=pooling, normalize=True, clock=clock)
    batch = make_batch(3, 1)
    with encoder.training_mode(1):
        encoder(pad(batch.store, np.arange(4), 3)).sum().backward()
    patched = entries(model)
    changed = [key for key in patched if patched[key] != unpatched.get(key)]
    with patches.lifted():
        assert entries(model) == unpatched
    assert entries(model) == patched
    patches.undo()
    assert entries(model) == unpatched
    assert len(changed) > 2 * len(clock._row_of) > 0, "hardly anything was patched"


def test_a_lifted_adapter_computes_as_it_is_patched() -> None:
    """The training forwards change what is kept, and nothing of what is computed."""
    batch, encoder = make_batch(4, 1), make_encoder("llama", 0.3)
    padded = pad(batch.store, np.arange(9), 3)
    with torch.no_grad(), encoder.training_mode(1):
        patched = encoder(padded)
        with patched_layers(encoder.model).lifted("forward"):
            assert any(isinstance(module, IdentityDropout) for module in encoder.model.modules())
            plain = encoder(padded)
    torch.testing.assert_close(patched, plain, rtol=1e-10, atol=1e-12)
    assert not torch.equal(patched, plain), "both ran the same layers"


def test_a_copy_of_a_model_has_patches_of_its_own() -> None:
    model = make_encoder("llama", 0.3, dtype=torch.float32).model
    copied = copy.deepcopy(model)
    patched_layers(copied).undo()
    modules = list(copied.modules())
    assert not any("forward" in vars(m) or isinstance(m, IdentityDropout) for m in modules)
    assert any("forward" in vars(module) for module in model.modules())
    patched_layers(model).undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_prefix_without_its_patches_grows() -> None:
    encoder = make_encoder("llama", dtype=torch.float32)
    ids_1T = torch.tensor([[7, 8]])
    with torch.no_grad():
        prefix = run_prefix(encoder.model, torch.tensor([4, 5, 6]))
        encoder.model(input_ids=ids_1T, past_key_values=prefix.cache, use_cache=True)
        assert prefix.cache.get_seq_length() == 3
        prefix.patches.undo()
        encoder.model(input_ids=ids_1T, past_key_values=prefix.cache, use_cache=True)
    assert prefix.cache.get_seq_length() == 5


def test_transformers_masking_is_given_back() -> None:
    from transformers import masking_utils

    attention.masking_patches.undo()
    names = (
        "find_packed_sequence_indices",
        "_ignore_causal_mask_sdpa",
        "_ignore_bidirectional_mask_sdpa",
    )
    originals = [getattr(masking_utils, name) for name in names]
    packed = torch.tensor([[0, 1, 0, 1]])
    with attention.whole_texts():
        assert masking_utils.find_packed_sequence_indices(packed) is None
    assert all(getattr(masking_utils, n) is not o for n, o in zip(names, originals, strict=True))
    attention.masking_patches.undo()
    assert [getattr(masking_utils, name) for name in names] == originals
    with attention.whole_texts():
        assert masking_utils.find_packed_sequence_indices(packed) is None
