"""The layout that `SentenceTransformer(path)` loads.

The exported tokenizer does all of a text's preparation: the template is a normaliser, the
beginning- and end-of-sequence tokens a post-processor. So sentence-transformers needs no code of
ours, and truncation keeps the last token. An adapter export records quantisation and depth of its
base, so that it loads on the base that was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem_cft.data.tokens import (
    TextFormat,
    Tokenizer,
    document_format,
    overhead,
    query_format,
)
from lowmem_cft.exporting.merge import merged_model
from lowmem_cft.exporting.tokenizer import prepared_tokenizer
from lowmem_cft.files import whole_folder
from lowmem_cft.inference.embed import embed_texts
from lowmem_cft.inference.loading import RECORD, Embedder
from lowmem_cft.machine import dtype_name, library_versions
from lowmem_cft.recipe.schema import Recipe

Kind = Literal["adapter", "merged"]

_POOLING_KEYS = {
    "last": "pooling_mode_lasttoken",
    "eos": "pooling_mode_lasttoken",
    "mean": "pooling_mode_mean_tokens",
    "weighted-mean": "pooling_mode_weightedmean_tokens",
    "cls": "pooling_mode_cls_token",
}


def _prompts(recipe: Recipe) -> tuple[TextFormat, dict[str, str]]:
    """The format to build into the tokenizer, and what is left for prompts.

    Raises:
        ValueError: the roles' templates differ in a way prompts cannot say.
    """
    query, document = query_format(recipe), document_format(recipe)
    if query == document:
        return query, {}
    if query.tail or document.tail:
        raise ValueError(
            "text.document_template: differs from text.template and one of them goes on after "
            "{text}; sentence-transformers knows prompts only before it, so set "
            "output.export: none, or give templates that end in {text}"
        )
    bare = TextFormat("{text}", query.append_eos, query.max_tokens)
    return bare, {"query": query.head, "document": document.head}


def check_expressible(recipe: Recipe) -> None:
    """Raise ValueError, before anything is trained, where the layout cannot say the recipe."""
    _prompts(recipe)


def _max_seq_length(tokenizer: Tokenizer, recipe: Recipe, model: Any) -> int | None:
    """Tokens to truncate at. Cutting a whole prompt would cut its tail, so with one it is not."""
    formats = (query_format(recipe), document_format(recipe))
    if any(text_format.tail for text_format in formats):
        longest = getattr(model.config, "max_position_embeddings", None)
        return int(longest) if longest else None
    most = max(overhead(tokenizer, text_format) for text_format in formats)
    return most + recipe.text.max_tokens


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
    text_format, prompts = _prompts(recipe)
    prepared_tokenizer(backbone.tokenizer, text_format).save_pretrained(folder)
    adapter = kind == "adapter"
    for name, values in {
        "modules.json": _modules(recipe.embedding.normalize),
        "1_Pooling/config.json": _pooling(recipe.embedding.pooling, width),
        "sentence_bert_config.json": {
            "max_seq_length": _max_seq_length(backbone.tokenizer, recipe, backbone.model),
            "do_lower_case": False,
            "model_args": backbone.loader_kwargs if adapter else {"dtype": dtype_name(dtype)},
            "config_args": backbone.config_kwargs if adapter else {},
        },
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        RECORD: {
            "kind": kind,
            "base": backbone.name,
            "versions": library_versions(),
            "recipe": recipe.model_dump(mode="json"),
        },
    }.items():
        _write_json(folder / name, values)
    (folder / "2_Normalize").mkdir(exist_ok=True)


def export_model(embedder: Embedder, target: Path, kind: Kind) -> None:
    """Write the model for sentence-transformers; `target` appears whole or not at all.

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
    with whole_folder(target) as folder:
        if kind == "adapter":
            encoder.model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        else:
            merged_model(encoder, dtype).save_pretrained(folder)
        _write_layout(folder, embedder, kind, dtype, width)
