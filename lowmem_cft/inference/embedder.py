"""A model's name -> what embeds texts, whichever library loads the model.

A folder that sentence-transformers wrote, and that is no export of ours, is embedded by
sentence-transformers; everything else by our own encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from lowmem_cft.inference.embed import Embed, Vectors
from lowmem_cft.inference.loading import Embedder, load_model
from lowmem_cft.model.backbone import readable_weights
from lowmem_cft.model.exported import RECORD
from lowmem_cft.model.precision import float32_arithmetic
from lowmem_cft.progress import Say


def is_plain_sentence_transformer(folder: Path) -> bool:
    """Whether sentence-transformers wrote the folder and we did not."""
    return (folder / "modules.json").is_file() and not (folder / RECORD).is_file()


class Embeds(Protocol):
    """Embeds texts, whichever library has loaded the model.

    `float32`: computes in float32 from the weights as stored.
    """

    @property
    def float32(self) -> bool: ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """float32 (texts, D), row i for text i.

        Raises:
            ValueError: there are no texts.
        """
        ...


def load_embedder(
    name: str,
    device: torch.device,
    say: Say,
    *,
    recipe_name: str | None = None,
    overrides: Sequence[str] = (),
    float32: bool = False,
    normalize: bool | None = None,
) -> Embeds:
    """Load a run's folder, an exported model, a sentence-transformers folder, or any base model.

    Args:
        float32: compute in float32 from the weights as stored, see `Embedder`.
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
                "leave out `recipe` and `overrides`"
            )
        return SentenceTransformerEmbedder(path, device, say, float32=float32, normalize=normalize)
    loaded = load_model(name, device, say, recipe_name=recipe_name, overrides=overrides)
    encoder = loaded.encoder if normalize is None else loaded.encoder.normalizing(normalize)
    return replace(loaded, encoder=encoder, float32=float32)


def normalized_or_not(embedder: Embeds, normalize: bool | None) -> Embed:
    """What embeds with vectors of length 1, or as they come; None for as the model says.

    A sentence-transformers folder always decides that itself.
    """
    if normalize is None or not isinstance(embedder, Embedder):
        return embedder.embed
    return replace(embedder, encoder=embedder.encoder.normalizing(normalize)).embed


class SentenceTransformerEmbedder:
    """A folder that sentence-transformers wrote, embedded by it; arguments as in `load_embedder`."""

    def __init__(
        self, folder: Path, device: torch.device, say: Say, *, float32: bool, normalize: bool | None
    ) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                f"{folder} is a sentence-transformers model: pip install 'lowmem-cft[check]' to "
                "score it"
            ) from error
        say(f"embedding with sentence-transformers: {folder}")
        with readable_weights(str(folder)):
            self.model = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
        if normalize is not None:
            modules = ", ".join(type(module).__name__ for module in self.model)
            say(f"its vectors are taken as its modules give them ({modules})")
        self.float32 = float32

    def embed(self, texts: Sequence[str]) -> Vectors:
        """As `Embeds.embed`; equal texts are encoded once."""
        if not texts:
            raise ValueError("got no texts to embed")
        distinct = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(distinct)}
        with float32_arithmetic(self.model) if self.float32 else nullcontext():
            emb_PD = self.model.encode(distinct, batch_size=64, convert_to_tensor=True)
        vectors: Vectors = emb_PD.float().cpu().numpy()[[place[text] for text in texts]]
        return vectors
