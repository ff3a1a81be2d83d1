"""Our base model and adapter in sentence-transformers: the same weights, the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_cft.data.tokens import TextFormat, query_format, surroundings, tokenize
from lowmem_cft.exporting.tokenizer import prepared_tokenizer
from lowmem_cft.machine import choose_dtype
from lowmem_cft.model.adapter import target_modules
from lowmem_cft.model.backbone import BackboneSource, quantization_kwargs
from lowmem_cft.model.precision import keep_weight_layout
from lowmem_cft.recipe.schema import ModelSection, Recipe

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_CUT = ("num_hidden_layers", "layer_types", "scale_depth")
"""What a configuration says of how many layers are kept."""


def base_in_st(
    section: ModelSection,
    source: BackboneSource,
    text_format: TextFormat,
    device: torch.device,
    folder: Path,
    *,
    normalize: bool = False,
) -> SentenceTransformer:
    """The same base in sentence-transformers, frozen, reading the last token.

    Args:
        folder: it does not exist yet, and takes the model's files.
        normalize: embeddings get unit norm. Where the similarity normalises, this is work done twice.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BitsAndBytesConfig

    lay_out(Path(source.name), prepared_tokenizer(source.tokenizer, text_format), folder)
    dtype = choose_dtype(section.dtype, device)
    kwargs: dict[str, Any] = {"dtype": dtype}
    if quantization := quantization_kwargs(section, dtype):
        quantization.pop("quant_method")
        kwargs["quantization_config"] = BitsAndBytesConfig(**quantization)
    if device.type == "cuda":
        kwargs["device_map"] = {"": device}
    transformer = Transformer(
        str(folder),
        max_seq_length=surroundings(source.tokenizer, text_format).num_tokens
        + text_format.max_tokens,
        model_kwargs=kwargs,
        config_kwargs={
            key: getattr(source.config, key) for key in _CUT if hasattr(source.config, key)
        },
    )
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    modules = [transformer, pooling, *([Normalize()] if normalize else [])]
    model = SentenceTransformer(modules=modules, device=str(device))
    model[0].auto_model.requires_grad_(False)
    keep_weight_layout(model)
    return model


def lay_out(base: Path, tokenizer: Any, folder: Path) -> None:
    """A model folder with the base's weights and the given tokenizer, so without chat template."""
    folder.mkdir()
    for file in base.iterdir():
        if file.name == "config.json" or "safetensors" in file.name:
            (folder / file.name).symlink_to(file.resolve())
    tokenizer.save_pretrained(folder)


def add_adapter(model: SentenceTransformer, recipe: Recipe) -> None:
    """Our adapter's configuration and start, through their `add_adapter`."""
    from peft import LoraConfig

    section = recipe.lora
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=target_modules(model[0].auto_model, section.targets),
        bias="none",
        task_type="FEATURE_EXTRACTION",
    )
    torch.manual_seed(recipe.train.seed)
    model.add_adapter(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_tokens(
    model: SentenceTransformer, tokenizer: Any, recipe: Recipe, texts: Sequence[str]
) -> None:
    """Both sides see the same token ids.

    Raises:
        RuntimeError: they do not.
    """
    store = tokenize(tokenizer, list(texts), query_format(recipe))
    theirs = model.preprocess(list(texts))
    for i, text in enumerate(texts):
        ids = theirs["input_ids"][i][theirs["attention_mask"][i].bool()].tolist()
        if ids != store[i].tolist():
            raise RuntimeError(f"other tokens for {text!r}: {store[i].tolist()}, theirs {ids}")
