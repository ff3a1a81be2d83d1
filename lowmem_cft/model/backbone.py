"""The frozen backbone, 4-bit or not, and its tokenizer.

The base model is loaded without its LM head, its own dropout is off, its embedding table and norms
keep their dtype: nothing is upcast.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_cft.data.tokens import Tokenizer
from lowmem_cft.files import read_json
from lowmem_cft.machine import choose_dtype, dtype_name
from lowmem_cft.model import sources
from lowmem_cft.model.bounds import choose_padding, num_ids
from lowmem_cft.model.configs import (
    GET_MODEL,
    base_model_kwargs,
    disable_layer_dropout,
    first_line,
    load_config,
)
from lowmem_cft.model.exported import plain_tokenizer, read_record
from lowmem_cft.model.precision import keep_weight_layout
from lowmem_cft.model.quantized import describe, quantization_of
from lowmem_cft.progress import Say
from lowmem_cft.recipe.schema import ModelSection


@dataclass(frozen=True)
class Backbone:
    """A loaded base model.

    `name`: what adapter_config.json names as its base: a hub id or folder that loads as it is.
    `loader_kwargs`, `config_kwargs`: what `AutoModel.from_pretrained` needs besides the name, as
    JSON values, to give the same model again.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    dtype: torch.dtype
    loader_kwargs: dict[str, Any]
    config_kwargs: dict[str, Any]


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices off the console; errors still show."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Its notice that an optional faster CPU kernel is absent reads like a failure.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")


def load_tokenizer(name: str, revision: str | None, num_ids: int | None = None) -> Tokenizer:
    """The model's fast tokenizer, with a padding token.

    Args:
        num_ids: rows of the embedding table, which the padding token is in.

    Raises:
        ValueError: the model has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, use_fast=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.id: {name} has no tokenizer that transformers can load ({first_line(error)}); "
            "put its tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if not len(tokenizer):
        raise ValueError(f"model.id: the tokenizer of {name} is empty")
    if (record := read_record(Path(name))) is not None:
        tokenizer = plain_tokenizer(tokenizer, record)
    choose_padding(tokenizer, num_ids)
    return tokenizer


def quantization_kwargs(section: ModelSection, dtype: torch.dtype) -> dict[str, Any]:
    """BitsAndBytesConfig fields of the recipe, as JSON values; empty if not quantized."""
    if section.quantization == "none":
        return {}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": section.double_quantization,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
    }


@dataclass(frozen=True)
class BackboneSource:
    """A base model's name, tokenizer and configuration: all of it but the weights.

    `name`, `config_kwargs`: see `Backbone`. `revision`: of a hub id, None for a folder.
    """

    name: str
    revision: str | None
    tokenizer: Tokenizer
    config: Any
    config_kwargs: dict[str, Any]


def find_backbone(section: ModelSection, say: Say = lambda text: None) -> BackboneSource:
    """The recipe's base model without its weights.

    Raises:
        ValueError: the model or its tokenizer does not exist or is damaged, or `keep_layers` does
            not fit it.
    """
    if (file := Path(section.id).expanduser() / "config.json").is_file():
        read_json(file, GET_MODEL)  # whoever reads it next does not name it
    if section.attention == "flash_attention_2":
        _check_flash_attention()
    name = sources.resolve(section.id, section.revision, say)
    revision = section.revision if name == section.id else None
    config, config_kwargs = load_config(section, name)
    tokenizer = load_tokenizer(name, revision, num_ids(config))
    if (note := _note_on_origin(name, section)) is not None:
        say(note)
    return BackboneSource(name, revision, tokenizer, config, config_kwargs)


def _check_flash_attention() -> None:
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        raise ValueError(
            "model.attention: got flash_attention_2, which needs a GPU and the package flash-attn; "
            "set model.attention: auto"
        )


def _note_on_origin(name: str, section: ModelSection) -> str | None:
    """What of a base model's folder is not taken over; None for a plain model."""
    folder = Path(name)
    if (record := read_record(folder)) is not None:
        template = record["recipe"]["text"]["template"]
        return (
            f"{section.id} is an export, trained under the template {template!r}: texts are prepared by "
            "this recipe's text section alone"
        )
    if (folder / "modules.json").is_file():
        return (
            f"{section.id} is a sentence-transformers model: its transformer is trained on, its pooling, "
            "prompts and further modules are not taken over; this recipe's text and embedding sections "
            "hold"
        )
    return None


@contextmanager
def readable_weights(name: str) -> Iterator[None]:
    """While entered, an error of loading weights names the damaged file of a folder (or hub id).

    Raises:
        ValueError: a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        yield
    except SafetensorError as error:
        damaged = name
        for file in sorted(Path(name).glob("*.safetensors")):
            try:
                safe_open(str(file), "pt")
            except SafetensorError:
                damaged = str(file)
        raise ValueError(f"{damaged}: cannot be read ({error}); {GET_MODEL}") from error


def load_backbone(
    section: ModelSection,
    device: torch.device,
    say: Say = lambda text: None,
    source: BackboneSource | None = None,
) -> Backbone:
    """Load the recipe's base model, frozen and in evaluation mode.

    Args:
        source: what `find_backbone` gave, if it was asked before.

    Raises:
        ValueError: the model, its tokenizer or an option does not exist, or a file is damaged.
        RuntimeError: the checkpoint lacks weights of the architecture.
    """
    from transformers import AutoModel, BitsAndBytesConfig

    source = source or find_backbone(section, say)
    name, revision, config = source.name, source.revision, source.config
    dtype = choose_dtype(section.dtype, device)
    loader_kwargs: dict[str, Any] = {"dtype": dtype_name(dtype), **base_model_kwargs(config)}
    if section.attention != "auto":
        loader_kwargs["attn_implementation"] = section.attention
    kwargs: dict[str, Any] = {**loader_kwargs, "dtype": dtype}
    held: str = section.quantization
    if own := quantization_of(config):
        held = f"{describe(own)}, as saved, whatever model.quantization says"
    elif quantization := quantization_kwargs(section, dtype):
        loader_kwargs["quantization_config"] = quantization
        kwargs["quantization_config"] = BitsAndBytesConfig(
            **{key: value for key, value in quantization.items() if key != "quant_method"}
        )
    if device.type == "cuda":
        kwargs["device_map"] = {"": device}
    say(f"loading {section.id} ({held}; {loader_kwargs['dtype']}) on {device}")
    with readable_weights(name):
        model, info = AutoModel.from_pretrained(
            name, config=config, revision=revision, output_loading_info=True, **kwargs
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise RuntimeError(f"{section.id} lacks {len(info['missing_keys'])} weights ({missing} ..)")
    model.requires_grad_(False)
    model.eval()
    disable_layer_dropout(model)
    keep_weight_layout(model)
    return Backbone(model, source.tokenizer, name, dtype, loader_kwargs, source.config_kwargs)
