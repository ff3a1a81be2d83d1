"""The layout that `SentenceTransformer(path)` loads.

A template's head is a prompt, its tail and the special tokens are put around a text by the
tokenizer, behind the cut. So sentence-transformers needs no code of ours and gives every text the
tokens it had in training. An adapter export records quantisation and depth of its base, so that it
loads on the base that was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem_cft.data.tokens import (
    Tokenizer,
    document_format,
    query_format,
    special_tokens,
    surroundings,
)
from lowmem_cft.exporting.merge import merged_model
from lowmem_cft.exporting.tokenizer import prepared_tokenizer
from lowmem_cft.inference.embed import embed_texts
from lowmem_cft.inference.loading import Embedder
from lowmem_cft.machine import dtype_name, library_versions
from lowmem_cft.model.configs import base_model_kwargs
from lowmem_cft.model.exported import RECORD
from lowmem_cft.recipe.schema import Recipe

Kind = Literal["adapter", "merged"]

_POOLING_KEYS = {
    "last": "pooling_mode_lasttoken",
    "eos": "pooling_mode_lasttoken",
    "mean": "pooling_mode_mean_tokens",
    "weighted-mean": "pooling_mode_weightedmean_tokens",
    "cls": "pooling_mode_cls_token",
}


def check_expressible(recipe: Recipe) -> None:
    """Refuse a recipe whose texts the layout cannot prepare, before anything is trained.

    Raises:
        ValueError: a tail that differs by role, or is joined to the text.
    """
    query, document = query_format(recipe), document_format(recipe)
    if query.tail != document.tail:
        raise ValueError(
            "text.document_template: differs from text.template behind {text}; sentence-transformers "
            "knows prompts by role only before the text, so set output.export: none, or give "
            "templates that end alike"
        )
    if recipe.text.joins_tail:
        raise ValueError(
            "text.tail: got joined, with a template that goes on behind {text}; sentence-transformers "
            "cannot make tokens of both together, so set text.tail: apart (where a text ends in "
            "punctuation the tokens differ a little), or output.export: none"
        )


def _prompts(recipe: Recipe) -> dict[str, str]:
    """What stands before a text, by its role."""
    heads = {"query": query_format(recipe).head, "document": document_format(recipe).head}
    return heads if any(heads.values()) else {}


def _lengths(tokenizer: Tokenizer, recipe: Recipe) -> dict[str, int]:
    """Tokens to truncate at, with all that stands around a text."""
    query, document = (
        surroundings(tokenizer, text_format).num_tokens + text_format.max_tokens
        for text_format in (query_format(recipe), document_format(recipe))
    )
    by_role = {} if query == document else {"query_length": query, "document_length": document}
    return {"max_seq_length": query, **by_role}


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _modules(normalize: bool) -> list[dict[str, Any]]:
    """The content of modules.json."""
    names = ["Transformer", "Pooling"] + ["Normalize"] * normalize
    return [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for i, name in enumerate(names)
    ]


def _pooling(pooling: str, width: int) -> dict[str, Any]:
    """The content of the pooling module's config.json."""
    return {
        "word_embedding_dimension": width,
        **dict.fromkeys(set(_POOLING_KEYS.values()), False),
        _POOLING_KEYS[pooling]: True,
        "include_prompt": True,
    }


def _write_layout(
    folder: Path, embedder: Embedder, kind: Kind, dtype: torch.dtype, width: int
) -> None:
    recipe, backbone = embedder.recipe, embedder.backbone
    prepared_tokenizer(backbone.tokenizer, query_format(recipe)).save_pretrained(folder)
    prompts = _prompts(recipe)
    special = special_tokens(backbone.tokenizer)
    adapter = kind == "adapter"
    merged_kwargs = {"dtype": dtype_name(dtype), **base_model_kwargs(backbone.model.config)}
    for name, values in {
        "modules.json": _modules(recipe.embedding.normalize),
        "1_Pooling/config.json": _pooling(recipe.embedding.pooling, width),
        "sentence_bert_config.json": {
            **_lengths(backbone.tokenizer, recipe),
            "do_lower_case": False,
            "model_args": backbone.loader_kwargs if adapter else merged_kwargs,
            "config_args": backbone.config_kwargs if adapter else {},
        },
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": "query" if prompts else None,
            "similarity_fn_name": "cosine",
        },
        RECORD: {
            "kind": kind,
            "base": backbone.name,
            "versions": library_versions(),
            "recipe": recipe.model_dump(mode="json"),
            # of the base's tokenizer, which this one's replace
            "special_tokens": {"opening": special.opening, "closing": special.closing},
        },
    }.items():
        _write_json(folder / name, values)
    (folder / "2_Normalize").mkdir(exist_ok=True)


def write_model(embedder: Embedder, folder: Path, kind: Kind) -> None:
    """Write the model for sentence-transformers into a new folder, which may exist empty.

    Args:
        kind: adapter: the adapter, loaded on its (4-bit) base by name; merged: all weights in
            16 bit, with no need of the base, peft or bitsandbytes.

    Raises:
        ValueError: there is no adapter, or the layout cannot express the recipe.
        OSError: it cannot be written.
    """
    encoder, backbone = embedder.encoder, embedder.backbone
    if not hasattr(encoder.model, "peft_config"):
        raise ValueError("nothing to export: this is a base model without an adapter")
    # not config.hidden_size: some models project their last hidden state (OPT-350m)
    width = embed_texts(encoder, embedder.tokenizer, ["a"], embedder.text_format).shape[1]
    dtype = torch.float16 if backbone.dtype == torch.float16 else torch.bfloat16
    if kind == "adapter":
        encoder.model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        merged_model(encoder, dtype).save_pretrained(folder)
    _write_layout(folder, embedder, kind, dtype, width)
