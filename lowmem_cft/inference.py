"""Texts -> embeddings in input order: tokenise, cut by length, encode, put back.

Identical texts are encoded once. Runs in the arithmetic of the weights, without autocast: the
exported model computes the same, so what is evaluated here is what users get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from lowmem_cft.encoder import Encoder
from lowmem_cft.gradcache import embed
from lowmem_cft.tokens import TextFormat, Tokenizer, chunk_by_tokens, pad, tokenize

Vectors = npt.NDArray[np.float32]


def embed_texts(
    encoder: Encoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    text_format: TextFormat,
    *,
    token_budget: int = 16384,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Vectors:
    """float32 (texts, D), row i for text i.

    Args:
        token_budget: padded tokens per chunk.
        on_progress: told how many more distinct texts are done, after each chunk.

    Raises:
        ValueError: there are no texts.
    """
    if not texts:
        raise ValueError("got no texts to embed")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    store = tokenize(tokenizer, list(place), text_format)

    def encode(place_B: torch.Tensor) -> torch.Tensor:
        emb_BD = encoder(pad(store, place_B.numpy(), tokenizer.pad_token_id))
        on_progress(len(place_B))
        return emb_BD.float().cpu()

    encoder.model.eval()
    chunks = [torch.from_numpy(chunk) for chunk in chunk_by_tokens(store.lengths, token_budget)]
    vectors = embed(encode, chunks, len(place)).numpy()
    result: Vectors = vectors[[place[text] for text in texts]]
    return result
