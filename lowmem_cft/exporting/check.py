"""Whether an export embeds as the model it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_cft.data.tokens import (
    TextFormat,
    Tokenizer,
    document_format,
    query_format,
    surroundings,
)
from lowmem_cft.exporting.layout import Kind
from lowmem_cft.inference.embed import Vectors, embed_texts
from lowmem_cft.inference.loading import Embedder
from lowmem_cft.model.adapter import base_model
from lowmem_cft.model.precision import float32_arithmetic, keep_weight_layout
from lowmem_cft.progress import Says

MIN_COSINE: dict[Kind, float] = {"adapter": 0.9999, "merged": 0.999}
"""An adapter export computes the same; a merged one rounds its weights to 16 bit once more."""

_NUM_CHECKED = 24
_LONGEST_CUT = 4096  # tokens; what is longer takes too long to be worth it

_PLAIN_TEXTS = (
    "A short sentence.",
    "The committee had postponed its decision until the auditors had seen all the books.",
    "Nobody told her that the last train was cancelled.",
    "Water boils at a lower temperature in the mountains.",
)
"""Compared where the recipe evaluates on no set."""


@dataclass(frozen=True)
class ExportCheck:
    """Lowest cosines between our vectors and those of the re-loaded export.

    `min_cosine`: both computed in float32 from the weights as stored, which is what is judged.
    `min_cosine_as_loaded`: each in its own 16-bit arithmetic, as a user runs it; on some CPUs
    bitsandbytes also repacks 4-bit weights for inference and rounds their scales.
    """

    num_texts: int
    min_cosine: float
    min_cosine_as_loaded: float


def awkward_texts(tokenizer: Tokenizer, text_format: TextFormat, num_ids: int) -> list[str]:
    """Texts whose tokens are easily got wrong: blank, cut, with added tokens in them.

    Args:
        num_ids: rows of the embedding table; tokens beyond it can stand in no text.
    """
    texts = ["  Two  blanks,\n\nempty lines \n", 'It ends in a quote."']
    if surroundings(tokenizer, text_format).num_tokens:
        texts.append("")
    if text_format.max_tokens <= _LONGEST_CUT:
        texts.append("One sentence after another, and no end. " * text_format.max_tokens)
    known = [token for i, token in tokenizer.added_tokens_decoder.items() if i < num_ids]
    added = sorted(known, key=lambda token: token.special)
    ends = dict.fromkeys(token.content for token in (*added[:2], *added[-2:]))
    texts += [f"before {content} and{content}after" for content in ends]
    return [*texts, *ends]


@dataclass(frozen=True)
class _Compared:
    """A text's cosine, and as what it was embedded."""

    cosine: float
    role: str
    text: str


class _BothSides:
    """The model that was trained and its export, loaded by sentence-transformers."""

    def __init__(self, embedder: Embedder, loaded: Any, texts: Sequence[str]) -> None:
        self.embedder, self.loaded = embedder, loaded
        query, document = query_format(embedder.recipe), document_format(embedder.recipe)
        encode: dict[str, tuple[TextFormat, Callable[..., Any]]] = {"text": (query, loaded.encode)}
        if query != document:
            encode = {
                "query": (query, loaded.encode_query),
                "document": (document, loaded.encode_document),
            }
        self._encode = encode
        table = base_model(embedder.encoder.model).get_input_embeddings()
        num_ids = table.num_embeddings
        self._texts = {
            role: [*texts, *awkward_texts(embedder.tokenizer, text_format, num_ids)]
            for role, (text_format, _) in encode.items()
        }

    @property
    def num_texts(self) -> int:
        return len({text for texts in self._texts.values() for text in texts})

    def lowest(self) -> _Compared:
        """The text whose vectors are furthest apart; one that is not finite is."""
        compared = []
        for role, (text_format, encode) in self._encode.items():
            texts = self._texts[role]
            ours = embed_texts(self.embedder.encoder, self.embedder.tokenizer, texts, text_format)
            theirs = encode(texts, convert_to_tensor=True, show_progress_bar=False)
            cosines = _cosines(ours, theirs)
            compared += [_Compared(c, role, text) for c, text in zip(cosines, texts, strict=True)]
        return min(compared, key=lambda pair: pair.cosine if pair.cosine == pair.cosine else -2.0)


def _cosines(ours: Vectors, theirs: torch.Tensor) -> list[float]:
    a, b = torch.from_numpy(ours).double(), theirs.cpu().double()
    cosines: list[float] = torch.nn.functional.cosine_similarity(a, b).tolist()
    return cosines


def check_export(
    folder: Path, kind: Kind, embedder: Embedder, texts: Sequence[str], way_out: str
) -> ExportCheck:
    """Load the export with sentence-transformers and compare it with the model it was made from.

    Args:
        way_out: what the message of a difference ends in.

    Raises:
        ImportError: sentence-transformers is not installed.
        RuntimeError: an embedding differs by more than `MIN_COSINE` allows.
    """
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(folder), device=str(embedder.encoder.device))
    both = _BothSides(embedder, loaded, texts)
    keep_weight_layout(loaded)
    with float32_arithmetic(embedder.encoder.model), float32_arithmetic(loaded):
        exact = both.lowest()
    if not exact.cosine >= MIN_COSINE[kind]:
        raise RuntimeError(
            f"the exported model does not embed as the trained one: of {both.num_texts} texts the "
            f"{exact.role} {_shortened(exact.text)} has cosine {exact.cosine:.5f}, wanted "
            f"{MIN_COSINE[kind]}; {way_out}"
        )
    keep_weight_layout(loaded, keep=False)
    return ExportCheck(both.num_texts, exact.cosine, both.lowest().cosine)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def checked(
    folder: Path,
    kind: Kind,
    embedder: Embedder,
    observer: Says,
    texts: Sequence[str] = (),
    *,
    way_out: str,
) -> ExportCheck | None:
    """Compare an export with its model and say so; None where it could not be compared.

    Args:
        texts: some of them are compared, and awkward ones besides.
        way_out: what the message of a difference ends in.

    Raises:
        RuntimeError: it does not embed as the model it was made from.
    """
    texts = list(texts[:_NUM_CHECKED]) or _PLAIN_TEXTS
    try:
        check = check_export(folder, kind, embedder, texts, way_out)
    except (ImportError, torch.OutOfMemoryError) as error:
        reason = (
            "sentence-transformers is not installed (pip install 'lowmem-cft[check]')"
            if isinstance(error, ImportError)
            else "the device has no room for a second copy of the model"
        )
        observer.say(f"NOT CHECKED: the export was not compared with the trained model: {reason}")
        return None
    num_awkward = check.num_texts - len(texts)
    observer.say(
        f"export checked: {len(texts)} texts and {num_awkward} awkward ones (blank, cut, with "
        f"special tokens) embed as in training, lowest cosine {check.min_cosine:.6f} "
        f"({check.min_cosine_as_loaded:.4f} in 16-bit arithmetic)"
    )
    return check
