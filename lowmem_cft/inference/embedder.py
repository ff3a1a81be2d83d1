"""A model's name -> what embeds texts, whichever library loads the model.

A sentence-transformers model, in a folder or on the hub, is embedded by sentence-transformers, by the
modules that it lists itself; an export of ours that lies in a folder, and everything else, by our own
encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lowmem_cft.inference.embed import Embed, Role, Vectors, role_named
from lowmem_cft.inference.loading import Embedder, load_model
from lowmem_cft.model.backbone import readable_weights
from lowmem_cft.model.configs import first_line
from lowmem_cft.model.exported import RECORD
from lowmem_cft.model.precision import float32_arithmetic
from lowmem_cft.model.sources import EMBEDDED
from lowmem_cft.progress import Say

_MODULES = "modules.json"
"""File by which sentence-transformers knows a model of its own."""

_SLICE = 1024
"""Distinct texts that sentence-transformers gets in one call, after which progress is told."""


def is_sentence_transformer(name: str, say: Say = lambda text: None) -> bool:
    """Whether sentence-transformers wrote the model, a folder or one on the hub.

    An export of ours in a folder is none: its record says more than its modules. Of a model on the
    hub the hub's cache is asked, then the hub, once.

    Args:
        say: told that the hub could not be asked, where that may change what is embedded.
    """
    path = Path(name).expanduser()
    if path.exists():
        return (path / _MODULES).is_file() and not (path / RECORD).is_file()
    if name == EMBEDDED:
        return False
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, _MODULES)
        if cached is not None:  # else the path, or a mark that the model has no such file
            return isinstance(cached, str)
        return file_exists(name, _MODULES)
    except HFValidationError:
        return False
    except Exception:  # what its HTTP library raises has no class of huggingface_hub's
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            say(
                f"taken for a bare model: {name} has no {_MODULES} in the hub's cache, and the hub "
                "cannot be asked whether it is a sentence-transformers model"
            )
        return False


class Embeds(Protocol):
    """Embeds texts, whichever library has loaded the model.

    `float32`: computes in float32 from the weights as stored.
    """

    @property
    def float32(self) -> bool: ...

    def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role | None = None,
        on_progress: Callable[[int], None] = ...,
        say: Say = ...,
    ) -> Vectors:
        """float32 (texts, D), row i for text i.

        Args:
            role: query or document, for a model that embeds them differently (one that does not
                gives the same vectors for both); None for what `encode` of sentence-transformers
                does, which for a model of ours is the query's.
            on_progress: told how many more distinct texts are done, now and then.
            say: told of what embeds more slowly than it might.

        Raises:
            ValueError: there are no texts, or no such role.
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
    """Load a run's folder, an exported model, a sentence-transformers model, or any base model.

    Args:
        name: a folder or hub id.
        float32: compute in float32 from the weights as stored, see `Embedder`.
        normalize: whether vectors get length 1; None for as the model says. A
            sentence-transformers model decides that itself, which is said.

    Raises:
        ValueError: as in `load_model`; also a recipe given for a sentence-transformers model, or
            sentence-transformers is not installed or cannot load it.
    """
    if is_sentence_transformer(name, say):
        if recipe_name is not None or overrides:
            raise ValueError(
                f"{name} is a sentence-transformers model and says itself how it embeds; "
                "leave out `recipe` and `overrides`"
            )
        return SentenceTransformerEmbedder(name, device, say, float32=float32, normalize=normalize)
    loaded = load_model(name, device, say, recipe_name=recipe_name, overrides=overrides)
    encoder = loaded.encoder if normalize is None else loaded.encoder.normalizing(normalize)
    return replace(loaded, encoder=encoder, float32=float32)


def normalized_or_not(embedder: Embeds, normalize: bool | None) -> Embed:
    """What embeds with vectors of length 1, or as they come; None for as the model says.

    A sentence-transformers model always decides that itself.
    """
    if normalize is None or not isinstance(embedder, Embedder):
        return embedder.embed
    return replace(embedder, encoder=embedder.encoder.normalizing(normalize)).embed


class SentenceTransformerEmbedder:
    """A model that sentence-transformers wrote, embedded by it; arguments as in `load_embedder`."""

    def __init__(
        self, name: str, device: torch.device, say: Say, *, float32: bool, normalize: bool | None
    ) -> None:
        say(f"embedding with sentence-transformers: {name}")
        self.model = _load_sentence_transformer(name, device)
        if normalize is not None:
            modules = ", ".join(type(module).__name__ for module in self.model)
            say(f"its vectors are taken as its modules give them ({modules})")
        self.float32 = float32

    def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role | None = None,
        on_progress: Callable[[int], None] = lambda texts: None,
        say: Say = warnings.warn,
    ) -> Vectors:
        """As `Embeds.embed`; equal texts are encoded once, and there is nothing to say."""
        role_named(role)
        if not texts:
            raise ValueError("got no texts to embed")
        model = self.model
        encode = {"query": model.encode_query, "document": model.encode_document}.get(
            role or "", model.encode
        )
        distinct = sorted(
            dict.fromkeys(texts), key=len, reverse=True
        )  # as encode does within a call
        place = {text: i for i, text in enumerate(distinct)}
        parts: list[Vectors] = []
        with float32_arithmetic(model) if self.float32 else nullcontext():
            for start in range(0, len(distinct), _SLICE):
                part = distinct[start : start + _SLICE]
                emb_XD = encode(
                    part, batch_size=64, convert_to_tensor=True, show_progress_bar=False
                )
                parts.append(emb_XD.float().cpu().numpy())
                on_progress(len(part))
        vectors: Vectors = np.concatenate(parts)[[place[text] for text in texts]]
        return vectors


def _found(name: str) -> str:
    """What sentence-transformers loads: the folder, or the hub id where the hub can be asked.

    Where it cannot, this is the folder of the hub's cache: given the id, the libraries would try for
    minutes whether there is a newer version.
    """
    from huggingface_hub import file_exists, snapshot_download

    path = Path(name).expanduser()
    if path.exists():
        return str(path)
    try:
        file_exists(name, _MODULES)
    except Exception:  # see is_sentence_transformer
        folder: str = snapshot_download(name, local_files_only=True)
        return folder
    return name


def _load_sentence_transformer(name: str, device: torch.device) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"{name} is a sentence-transformers model: pip install 'lowmem-cft[check]' to embed "
            "with it"
        ) from error
    found = _found(name)
    with readable_weights(found):
        try:
            return SentenceTransformer(
                found, device=str(device), local_files_only=Path(found).exists()
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(
                f"{name}: sentence-transformers, which runs no remote code here, cannot load it: "
                f"{first_line(error)}"
            ) from error
