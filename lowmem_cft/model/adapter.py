"""The LoRA adapter: which layers have one, its dropout, and what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowmem_cft.model.dropout import DropoutClock, IdentityDropout
from lowmem_cft.model.lora import use_lean_layers
from lowmem_cft.model.patches import Patches, patched_layers
from lowmem_cft.model.trainable import is_mixture
from lowmem_cft.recipe.schema import LoraSection


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers, 4-bit ones and GPT-2's `Conv1D` too."""
    from transformers.pytorch_utils import Conv1D

    kinds: tuple[type, ...] = (nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def adaptable_names(model: nn.Module) -> list[str]:
    """Those of `linear_names` that an adapter is put on.

    In a mixture of experts these are attention's. The experts are no linear layers, an adapted
    router would send texts elsewhere, and peft takes the names of other feed-forward layers there
    for those of experts.
    """
    names = linear_names(model)
    if not is_mixture(getattr(model, "config", None)):
        return names
    return [name for name in names if _inside(name, _ATTENTION)]


def _inside(name: str, parts: tuple[str, ...]) -> bool:
    return any(part.endswith(parts) for part in name.split(".")[:-1])


_ATTENTION = ("attn", "attention")


def target_modules(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """The recipe's `lora.targets` as full module names.

    Raises:
        ValueError: a name fits no linear layer; the message lists those there are.
    """
    names = adaptable_names(model)
    if not names:
        raise ValueError(f"lora.targets: {type(model).__name__} has no linear layers to adapt")
    if targets == "all-linear":
        return names
    if isinstance(targets, str):
        inside = {"attention": _ATTENTION, "mlp": ("mlp", "fc1", "fc2", "ffn")}[targets]
        chosen = [name for name in names if _inside(name, inside) or name.split(".")[-1] in inside]
        if not chosen:
            raise ValueError(f"lora.targets: no {targets} layers found; {_listing(names)}")
        return chosen
    chosen = []
    for target in targets:
        fitting = [name for name in names if name == target or name.endswith(f".{target}")]
        if not fitting:
            raise ValueError(f"lora.targets: got {target!r}; {_listing(names)}")
        chosen += fitting
    return list(dict.fromkeys(chosen))


def _listing(names: list[str]) -> str:
    last = sorted({name.rpartition(".")[2] for name in names})
    return f"the linear layers of this model are named {', '.join(last)}"


def attach_adapter(
    model: Any,
    section: LoraSection,
    clock: DropoutClock,
    *,
    seed: int,
    revision: str | None = None,
) -> Any:
    """A PeftModel with a fresh LoRA adapter in float32 (float64 on a float64 model).

    Its dropout reads `clock`; see `IdentityDropout`.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = target_modules(model, section.targets)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        use_rslora=section.rslora,
        init_lora_weights="gaussian" if section.init == "gaussian" else True,
        bias="none",
        task_type="FEATURE_EXTRACTION",
    )
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config, revision=revision)
    if model.dtype == torch.float64:
        peft_model.double()
    if section.init == "orthogonal":
        _make_orthogonal(peft_model, seed)
    patches = patched_layers(peft_model)
    replace_dropout(peft_model, section.dropout, clock, patches)
    use_lean_layers(peft_model, patches)
    peft_model.eval()
    return peft_model


@torch.no_grad()
def _make_orthogonal(peft_model: Any, seed: int) -> None:
    """A and B of every layer not zero, and BA zero: B spans what A does not.

    peft's own gives A and B the dtype of the base's weights, which 4-bit ones cannot have, also
    where an adapter is loaded again.
    """
    from peft.tuners.lora.layer import LoraLayer

    torch.manual_seed(seed)
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            a_RF, b_GR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rank = a_RF.shape[0]
            basis_RR = torch.linalg.qr(torch.randn(rank, rank)).Q
            a_RF.copy_((torch.randn(a_RF.shape[1], rank // 2) @ basis_RR[0::2]).T / 10)
            b_GR.copy_(torch.randn(b_GR.shape[0], rank // 2) @ basis_RR[1::2] / 10)


def replace_dropout(
    peft_model: nn.Module, rate: float, clock: DropoutClock, patches: Patches
) -> None:
    """Install identity dropout in the place of every LoRA layer's own."""
    if not rate:
        return
    replaced = 0
    for name, module in peft_model.named_modules():
        if isinstance(dropouts := getattr(module, "lora_dropout", None), nn.ModuleDict):
            for key in list(dropouts):
                patches.install(dropouts, key, IdentityDropout(rate, f"{name}.{key}", clock))
                replaced += 1
    assert replaced, "LoRA layers without dropout modules: peft has changed its layout"


def base_model(model: Any) -> Any:
    """The transformers model inside a PeftModel, whose LoRA layers it keeps; else the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, in the model's order; the base is frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_checkpointing(model: Any, every: int) -> None:
    """Non-reentrant gradient checkpointing of every k-th layer from the k-th on; 0 is none, 1 all.

    Not from the first on: where nothing is trained before it, the first layer keeps little.

    Raises:
        ValueError: the architecture does not support it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = base_model(model)
    if every and not base.supports_gradient_checkpointing:
        raise ValueError(
            f"memory.checkpointing: got on, but {type(base).__name__} does not support it; "
            "set it to off and lower memory.token_budget"
        )
    # transformers 5.23 renamed the methods; the older names warn there.
    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if not every:
        getattr(base, f"{kind}_checkpointing_disable")()
        return
    getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i % every == every - 1
