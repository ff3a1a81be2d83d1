"""Texts -> embeddings in input order: tokenise, cut by length, encode, put back.

Identical texts are encoded once. Runs in the arithmetic of the weights, without autocast: the
exported model computes the same, so what is evaluated here is what users get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from lowmem_cft.encoder import Encoder
from lowmem_cft.oom import Chunk, work_off
from lowmem_cft.tokens import TextFormat, Tokenizer, cut_by_length, pad, tokenize

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
        token_budget: padded tokens per chunk; halved where memory runs out.
        on_progress: told how many more distinct texts are done, after each chunk.

    Raises:
        ValueError: there are no texts.
    """
    if not texts:
        raise ValueError("got no texts to embed")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    store = tokenize(tokenizer, list(place), text_format)

    vectors_PD = torch.empty(0)

    def embed(chunk: Chunk) -> None:
        nonlocal vectors_PD
        batch = pad(store, chunk.place_B.numpy(), tokenizer.pad_token_id)
        with torch.no_grad():
            emb_BD = encoder(batch).float().cpu()
        if not len(vectors_PD):
            vectors_PD = torch.empty((len(place), emb_BD.shape[1]))
        vectors_PD[chunk.place_B] = emb_BD
        on_progress(len(chunk.place_B))

    encoder.model.eval()
    everything = torch.arange(len(place))
    work_off(everything, token_budget, partial(cut_by_length, store.lengths), embed, "embedding")
    result: Vectors = vectors_PD.numpy()[[place[text] for text in texts]]
    return result
