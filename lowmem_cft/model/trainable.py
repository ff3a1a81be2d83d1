"""What trains exactly here, told from configuration and recipe before any weight is read."""

from __future__ import annotations

import re
from typing import Any

from lowmem_cft.model.quantized import check_trains_quantized
from lowmem_cft.recipe.schema import LoraSection, ModelSection

_NUM_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_|moe_)?experts")

EXACT_MIXTURES = (
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)
"""Mixtures of experts of which a test holds that chunks do not change their gradient."""


def is_mixture(config: Any) -> bool:
    """Whether a configuration is one of a mixture of experts."""
    return config is not None and _has_experts(config.to_dict())


def _has_experts(values: Any) -> bool:
    if not isinstance(values, dict):
        return False
    return any(
        (isinstance(value, int) and value > 1 and _NUM_EXPERTS.fullmatch(key) is not None)
        or _has_experts(value)
        for key, value in values.items()
    )


def notes_on(config: Any) -> list[str]:
    """What to say of how a model is trained that nobody would take for granted."""
    if not is_mixture(config):
        return []
    return [
        "a mixture of experts: the adapter sits on attention alone; routers and experts stay as "
        "they are, the experts unquantised under model.quantization: nf4 too"
    ]


def is_multimodal(config: Any) -> bool:
    """Whether a model has parts for images or sounds beside its text part."""
    if config.is_encoder_decoder:
        return False
    others = any(hasattr(config, key) for key in ("vision_config", "audio_config"))
    return others or config.get_text_config() is not config


def check_trains(config: Any, model: ModelSection, lora: LoraSection) -> None:
    """Refuse what does not train exactly here.

    Raises:
        ValueError: a checkpoint quantised in a way that is not trained on, a model of images or
            sounds too, a mixture of experts that is not known to be exact, or a LoRA
            initialisation that the rank does not allow.
    """
    check_trains_quantized(config, model.id)
    if is_multimodal(config):
        raise ValueError(
            f"model.id: {model.id} ({config.model_type}) reads more than text, and only text is "
            "trained on here; save its text part in Python, `from transformers import AutoModel; "
            f'AutoModel.from_pretrained({model.id!r}).language_model.save_pretrained("FOLDER")`, '
            "put its tokenizer files there too, and set model.id: FOLDER"
        )
    if is_mixture(config) and config.model_type not in EXACT_MIXTURES:
        raise ValueError(
            f"model.id: {model.id} is a mixture of experts of the type {config.model_type}, of which "
            "it is not known that chunks leave its gradient unchanged; those that are known: "
            f"{', '.join(EXACT_MIXTURES)}; or name a model without experts"
        )
    if lora.init == "orthogonal" and lora.rank % 2:
        raise ValueError(
            f"lora.rank: got {lora.rank}, but lora.init: orthogonal needs an even rank; set "
            f"lora.rank: {lora.rank + 1}, or lora.init: default"
        )
