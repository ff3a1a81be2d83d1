"""Texts -> embeddings in input order: tokenise, cut by length, encode, put back.

Identical texts are encoded once, and so are the tokens that texts begin with in common (a
template's head, demonstrations). Runs in the arithmetic of the weights, without autocast: the exported model
computes the same, so what is evaluated here is what users get.

Shape suffixes: P distinct texts, Q of a group, B of a chunk, D embedding size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lowmem_cft.data.chunks import Chunk, cut_by_length, pad
from lowmem_cft.data.tokens import TextFormat, Tokenizer, TokenStore, surroundings, tokenize
from lowmem_cft.gradient.oom import work_off
from lowmem_cft.inference.prefix_sharing import Shared, behind, share
from lowmem_cft.model.adapter import base_model
from lowmem_cft.model.bounds import check_ids, check_length
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.prefix import Prefix
from lowmem_cft.progress import Say

Vectors = npt.NDArray[np.float32]

Embed = Callable[[Sequence[str]], Vectors]
"""Maps texts to float32 (texts, D), row i for text i; equal texts may be encoded once."""

Role = Literal["query", "document"]
"""What a text is in a search; a model may put another template around each."""


_ROLES: dict[str | None, Role | None] = {None: None, "query": "query", "document": "document"}


def role_named(name: str | None) -> Role | None:
    """The role of that name, None for None.

    Raises:
        ValueError: there is none.
    """
    if name not in _ROLES:
        raise ValueError(f"`role`: got {name!r}, wanted query or document")
    return _ROLES[name]


_PREFIX_WEIGHT = 4
"""Tokens of a prefix that take the memory of one token of a chunk: theirs is keys and values alone."""


def embed_texts(
    encoder: Encoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    text_format: TextFormat,
    *,
    token_budget: int = 16384,
    share_prefix: bool = True,
    on_progress: Callable[[int], None] = lambda texts: None,
    say: Say = warnings.warn,
) -> Vectors:
    """float32 (texts, D), row i for text i.

    Args:
        token_budget: padded tokens per chunk; halved where memory runs out.
        share_prefix: run the tokens that texts begin with once, where that saves work and the
            embedding is read at the last token. In float32 the vectors are the same to 1e-5.
        on_progress: told how many more distinct texts are done, after each chunk.
        say: told why a prefix that would save work is not shared.

    Raises:
        ValueError: there are no texts, or the model cannot take one of them.
    """
    if not texts:
        raise ValueError("got no texts to embed")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    store = tokenize(tokenizer, list(place), text_format)
    check_ids(base_model(encoder.model), tokenizer, store)
    longest = int(store.lengths.max())
    on_top = surroundings(tokenizer, text_format).num_tokens
    check_length(base_model(encoder.model), longest, on_top)
    pad_id = tokenizer.pad_token_id
    encoder.model.eval()
    shared = share(encoder, store, pad_id, say) if share_prefix else None
    vectors_PD = torch.empty(0)

    def embed(group: _Group, chunk: Chunk) -> None:
        nonlocal vectors_PD
        batch = pad(group.store, chunk.place_B.numpy(), pad_id)
        with torch.no_grad():
            emb_BD = encoder(batch, prefix=group.prefix).float().cpu()
        if not len(vectors_PD):
            vectors_PD = torch.empty((len(place), emb_BD.shape[1]))
        vectors_PD[group.place_Q[chunk.place_B]] = emb_BD
        on_progress(len(chunk.place_B))

    for group in _groups(store, shared):
        everything = torch.arange(len(group.store))
        cut = partial(cut_by_length, group.lengths)
        work = partial(embed, group)
        token_budget = work_off(everything, token_budget, cut, work, "embedding")
    result: Vectors = vectors_PD.numpy()[[place[text] for text in texts]]
    return result


@dataclass(frozen=True)
class _Group:
    """Texts at int64 (Q,) places; `store` holds what stands behind `prefix` in each of them."""

    place_Q: torch.Tensor
    store: TokenStore
    prefix: Prefix | None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 (Q,): what each text takes of the token budget."""
        prefix_tokens = 0 if self.prefix is None else self.prefix.num_tokens
        return self.store.lengths + prefix_tokens // _PREFIX_WEIGHT


def _groups(store: TokenStore, shared: Shared | None) -> list[_Group]:
    """The texts that begin with the prefix, and those that do not."""
    everything = np.arange(len(store))
    if shared is None:
        return [_Group(torch.from_numpy(everything), store, None)]
    others = np.setdiff1d(everything, shared.place_Q)
    own = behind(store, shared.place_Q, shared.prefix.num_tokens)
    return [
        _Group(torch.from_numpy(shared.place_Q), own, shared.prefix),
        _Group(torch.from_numpy(others), behind(store, others, 0), None),
    ]
