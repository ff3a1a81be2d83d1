"""A name on the command line -> what embeds texts, whichever library loads the model.

A folder that sentence-transformers wrote, and that is no export of ours, is embedded by
sentence-transformers; everything else by our own encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lowmem_cft.inference.embed import Embed, Vectors, embed_texts
from lowmem_cft.inference.loading import RECORD, load_model
from lowmem_cft.model.backbone import readable_weights
from lowmem_cft.model.precision import float32_arithmetic
from lowmem_cft.progress import Say


def is_plain_sentence_transformer(folder: Path) -> bool:
    """Whether sentence-transformers wrote the folder and we did not."""
    return (folder / "modules.json").is_file() and not (folder / RECORD).is_file()


def load_embedder(
    name: str,
    device: torch.device,
    say: Say,
    *,
    recipe_name: str | None = None,
    overrides: Sequence[str] = (),
    float32: bool = False,
    normalize: bool | None = None,
) -> Embed:
    """Load a run's folder, an exported model, a sentence-transformers folder, or any base model.

    Args:
        float32: compute in float32 from the weights as stored. In 16 bit a text's embedding, and
            so the third decimal of a score, depends on what it is batched with.
        normalize: whether vectors get length 1; None for as the model says. A
            sentence-transformers folder decides that itself, which is said.

    Raises:
        ValueError: as in `load_model`; also a recipe given for a sentence-transformers folder, or
            sentence-transformers is not installed.
    """
    path = Path(name).expanduser()
    if is_plain_sentence_transformer(path):
        if recipe_name is not None or overrides:
            raise ValueError(
                f"{name} is a sentence-transformers model and says itself how it embeds; "
                "leave out --recipe and --set"
            )
        return _sentence_transformer(path, device, say, float32, normalize)
    loaded = load_model(name, device, say, recipe_name=recipe_name, overrides=overrides)
    if normalize is not None:
        loaded.encoder.normalize = normalize
    embed = partial(
        embed_texts,
        loaded.encoder,
        loaded.tokenizer,
        text_format=loaded.text_format,
        token_budget=loaded.recipe.eval.token_budget,
        say=say,
    )
    return _in_float32(loaded.encoder.model, embed) if float32 else embed


def _in_float32(model: nn.Module, embed: Embed) -> Embed:
    def exact(texts: Sequence[str]) -> Vectors:
        with float32_arithmetic(model):
            return embed(texts)

    return exact


def _sentence_transformer(
    folder: Path, device: torch.device, say: Say, float32: bool, normalize: bool | None
) -> Embed:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"{folder} is a sentence-transformers model: pip install 'lowmem-cft[check]' to score it"
        ) from error
    say(f"embedding with sentence-transformers: {folder}")
    with readable_weights(str(folder)):
        model = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
    if normalize is not None:
        modules = ", ".join(type(module).__name__ for module in model)
        say(f"its vectors are taken as its modules give them ({modules})")

    def embed(texts: Sequence[str]) -> Vectors:
        if not texts:
            raise ValueError("got no texts to embed")
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        found = model.encode(distinct, batch_size=64, convert_to_tensor=True)
        vectors: Vectors = found.float().cpu().numpy()[[place[text] for text in texts]]
        return vectors

    return _in_float32(model, embed) if float32 else embed
