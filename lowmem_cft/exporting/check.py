"""Whether an export embeds as the model it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem_cft.data.tokens import TextFormat, Tokenizer, overhead, tokenize
from lowmem_cft.exporting.layout import Kind
from lowmem_cft.inference.embed import Vectors, embed_texts
from lowmem_cft.inference.loading import Embedder
from lowmem_cft.model.precision import float32_arithmetic, keep_weight_layout
from lowmem_cft.progress import Says
from lowmem_cft.recipe.schema import TEXT_SLOT

MIN_COSINE: dict[Kind, float] = {"adapter": 0.9999, "merged": 0.999}
"""An adapter export computes the same; a merged one rounds its weights to 16 bit once more."""

NUM_CHECKED = 32


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


def _min_cosine(ours: Vectors, theirs: torch.Tensor) -> float:
    a, b = torch.from_numpy(ours).double(), theirs.cpu().double()
    return float(torch.nn.functional.cosine_similarity(a, b).min())


def check_export(folder: Path, kind: Kind, embedder: Embedder, texts: Sequence[str]) -> ExportCheck:
    """Load the export with sentence-transformers and compare it with the model it was made from.

    Raises:
        ImportError: sentence-transformers is not installed.
        RuntimeError: an embedding differs by more than `MIN_COSINE` allows.
    """
    from sentence_transformers import SentenceTransformer

    texts = list(texts[:NUM_CHECKED])
    loaded = SentenceTransformer(str(folder), device=str(embedder.encoder.device))
    name = "query" if loaded.prompts.get("query") else None

    def lowest() -> float:
        ours = embed_texts(embedder.encoder, embedder.tokenizer, texts, embedder.text_format)
        theirs = loaded.encode(
            texts, prompt_name=name, convert_to_tensor=True, show_progress_bar=False
        )
        return _min_cosine(ours, theirs)

    keep_weight_layout(loaded)
    with float32_arithmetic(embedder.encoder.model), float32_arithmetic(loaded):
        exact = lowest()
    keep_weight_layout(loaded, keep=False)
    check = ExportCheck(len(texts), exact, lowest())
    if not check.min_cosine >= MIN_COSINE[kind]:
        raise RuntimeError(
            f"the exported model in {folder} does not embed as the trained one: lowest cosine of "
            f"{check.num_texts} texts is {check.min_cosine:.5f}, wanted {MIN_COSINE[kind]}; "
            "the trained adapter itself is safe in the run's folder"
        )
    return check


_PLAIN_TEXTS = (
    "A short sentence.",
    "The committee had postponed its decision until the auditors had seen all the books.",
    "Nobody told her that the last train was cancelled.",
    "Water boils at a lower temperature in the mountains.",
)
"""Compared after the export where the recipe evaluates on no set."""


def checked(
    target: Path, kind: Kind, embedder: Embedder, observer: Says, texts: Sequence[str] = ()
) -> ExportCheck | None:
    """Compare an export with its model and say so; None where it could not be compared.

    Args:
        texts: to compare on; those that truncation would cut are left out, since a whole prompt
            is cut before its tail here and not at all by sentence-transformers.

    Raises:
        RuntimeError: it does not embed as the model it was made from.
    """
    fitting = fitting_texts(embedder.tokenizer, texts, embedder.text_format)
    try:
        check = check_export(target, kind, embedder, fitting or _PLAIN_TEXTS)
    except (ImportError, torch.OutOfMemoryError) as error:
        reason = (
            "sentence-transformers is not installed (pip install 'lowmem-cft[check]')"
            if isinstance(error, ImportError)
            else "the device has no room for a second copy of the model"
        )
        observer.say(f"NOT CHECKED: the export was not compared with the trained model: {reason}")
        return None
    observer.say(
        f"export checked on {check.num_texts} texts: lowest cosine {check.min_cosine:.6f} "
        f"({check.min_cosine_as_loaded:.4f} in 16-bit arithmetic)"
    )
    return check


def fitting_texts(tokenizer: Tokenizer, texts: Sequence[str], text_format: TextFormat) -> list[str]:
    """The first texts that are not truncated, as many as a check compares."""
    texts = list(texts[: 4 * NUM_CHECKED])
    if not texts:
        return []
    bare = TextFormat(TEXT_SLOT, append_eos=False, max_tokens=text_format.max_tokens + 1)
    lengths = tokenize(tokenizer, texts, bare).lengths - overhead(tokenizer, bare)
    fits = [t for t, n in zip(texts, lengths, strict=True) if n <= text_format.max_tokens]
    return fits[:NUM_CHECKED]
