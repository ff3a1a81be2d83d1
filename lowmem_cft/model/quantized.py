"""How a checkpoint holds its weights already, and how a recipe has them held.

A checkpoint that was saved in 4 bits by bitsandbytes is loaded as it is: its weights are what the
adapter is trained on, whatever the recipe says. What other methods leave is not trained on here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowmem_cft.recipe.schema import ModelSection

_HEADED = ("model.", "transformer.")  # what a model with a head puts before its layers' names


def quantization_of(config: Any) -> dict[str, Any]:
    """The fields by which a configuration says how its checkpoint is quantised; empty if it is not."""
    own = getattr(config, "quantization_config", None) or {}
    return dict(own if isinstance(own, dict) else own.to_dict())


def describe(own: dict[str, Any]) -> str:
    """The method of a quantised checkpoint, such as `nf4 of bitsandbytes`."""
    if own.get("load_in_4bit"):
        return f"{own.get('bnb_4bit_quant_type', 'fp4')} of bitsandbytes"
    if own.get("load_in_8bit"):
        return "int8 of bitsandbytes"
    return str(own.get("quant_method", "an unknown method"))


def check_trains_quantized(config: Any, model_id: str) -> None:
    """Refuse to train on a quantised checkpoint that does not train exactly here.

    Raises:
        ValueError: it is quantised otherwise than in bitsandbytes' 4 bits.
    """
    own = quantization_of(config)
    if not own or own.get("load_in_4bit"):
        return
    reason = (
        "which rounds a text's activations by what it is batched with"
        if own.get("load_in_8bit")
        else "which adapters are not trained on here"
    )
    raise ValueError(
        f"model.id: {model_id} is quantised already ({describe(own)}), {reason}; name its "
        "unquantised checkpoint, which model.quantization: nf4 holds in 4 bits, or one in "
        "bitsandbytes' 4 bits"
    )


def own_skipped_modules(config: Any) -> dict[str, Any]:
    """The quantisation fields of a checkpoint under the names of a model without a head.

    transformers compares the names of modules that stayed unquantised with those of the model that
    is loaded, and finds none of `model.layers.0.mlp` where the layers are called `layers.0`.

    Returns:
        What to set in the configuration; empty where it is right already.
    """
    own = quantization_of(config)
    names = list(own.get("llm_int8_skip_modules") or [])
    bare = [name.removeprefix(head) for head in _HEADED for name in names if name.startswith(head)]
    if not (new := [name for name in bare if name not in names]):
        return {}
    return {"quantization_config": {**own, "llm_int8_skip_modules": names + new}}


@dataclass(frozen=True)
class FourBits:
    """Which linear layers are held in 4 bits, and whether their scales are quantised too."""

    double: bool
    skipped: tuple[str, ...] = ()

    def holds(self, name: str, layer: nn.Module) -> bool:
        """Whether the linear layer of this full name is one of them, as transformers decides it."""
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:  # a router
            return False
        return not any(
            re.match(rf"(?:{key})(?=\.|$)", name) or name.endswith(key) for key in self.skipped
        )


def four_bits(config: Any, section: ModelSection) -> FourBits | None:
    """How a recipe's model is held in 4 bits; None where it is not."""
    if own := quantization_of(config):
        skipped = tuple(own.get("llm_int8_skip_modules") or ())
        double = bool(own.get("bnb_4bit_use_double_quant"))
        return FourBits(double, skipped) if own.get("load_in_4bit") else None
    return FourBits(section.double_quantization) if section.quantization == "nf4" else None
