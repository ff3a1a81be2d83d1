"""Which tokens texts begin with in common, and whether a backbone may run them once for all.

Shape suffixes: P texts, Q of them that begin alike, K tokens they begin with, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_cft.data.chunks import pad
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient.oom import try_in_memory
from lowmem_cft.model.adapter import base_model
from lowmem_cft.model.encoder import Encoder
from lowmem_cft.model.prefix import NotShared, Prefix, run_prefix
from lowmem_cft.progress import Say

Places = npt.NDArray[np.int64]

_MIN_PREFIX = 4
"""Tokens. A shorter prefix saves less than its attention mask takes."""
_CALL_COST = 32
"""What a call of the backbone costs, in tokens' worth of time."""
_MAX_APART = {torch.float32: 1e-5, torch.float64: 1e-5}
_MAX_APART_16_BIT = 0.03
"""Largest difference in any number of a text's two unit embeddings, with a shared prefix and whole.
In 32 bits it is what users are promised. In bfloat16 rounding alone makes a hundredth, and a prefix
that is not seen, or positions that begin anew, a fifth (SmolLM2-135M)."""


@dataclass(frozen=True)
class Shared:
    """A prefix that was run, and int64 (Q,) places of the texts that begin with it."""

    prefix: Prefix
    place_Q: Places


def common_prefix(store: TokenStore) -> tuple[int, Places]:
    """How many tokens to share and int64 (Q,) places of the texts that begin with them.

    Of all prefixes of more than half of the texts it is the one that saves most tokens, so that a
    few texts that begin otherwise (a tokenizer may merge the template's last character with the
    text's first) do not shorten it for the others. Each text keeps a token of its own.
    """
    start_P, length_P = store.offsets[:-1], store.lengths
    place_Q = np.arange(len(store))
    best, most_saved = (0, place_Q), 0
    for num_tokens in range(1, int(length_P.max())):
        place_Q = place_Q[length_P[place_Q] > num_tokens]
        id_Q = store.ids[start_P[place_Q] + num_tokens - 1]
        if len(id_Q):
            ids, counts = np.unique(id_Q, return_counts=True)
            place_Q = place_Q[id_Q == ids[counts.argmax()]]
        if 2 * len(place_Q) <= len(store):
            break
        saved = num_tokens * (len(place_Q) - 1)
        if saved > most_saved:
            best, most_saved = (num_tokens, place_Q), saved
    return best


def behind(store: TokenStore, place_Q: Places, num_tokens: int) -> TokenStore:
    """The texts at int64 (Q,) places without their first `num_tokens`; each has more than that."""
    length_Q = store.lengths[place_Q] - num_tokens
    offsets = np.concatenate([[0], np.cumsum(length_Q)]).astype(np.int64)
    moved_Q = store.offsets[place_Q] + num_tokens - offsets[:-1]
    return TokenStore(store.ids[np.arange(offsets[-1]) + np.repeat(moved_Q, length_Q)], offsets)


def share(encoder: Encoder, store: TokenStore, pad_id: int, say: Say) -> Shared | None:
    """Run the common prefix; None where that saves nothing or the backbone cannot share it.

    Only a causal backbone can. Two texts are embedded with it and whole first, unless such a prefix is proven: other families
    than those tested may keep more of their past than keys and values, or let a prefix see what
    follows.

    Args:
        say: told why a prefix that would save work is not shared.
    """
    num_tokens, place_Q = common_prefix(store)
    if not encoder.reads_last or num_tokens < _MIN_PREFIX:
        return None
    longest = int(store.lengths[place_Q].max())
    proven = encoder.proven_prefix.covers(num_tokens, longest)
    cost = num_tokens + _CALL_COST + (0 if proven else 4 * longest + 2 * _CALL_COST)
    if num_tokens * (len(place_Q) - 1) <= cost:
        return None
    ids_K = torch.from_numpy(store[int(place_Q[0])][:num_tokens].astype(np.int64))
    try:
        if encoder.masked:
            name = type(base_model(encoder.model)).__name__
            raise NotShared(f"in {name} they see the texts that follow them")
        shared = Shared(run_prefix(encoder.model, ids_K.to(encoder.device)), place_Q)
        if not proven:
            _try_out(encoder, store, shared, pad_id)
            encoder.proven_prefix.set(num_tokens, longest)
    except NotShared as reason:
        say(f"the {num_tokens} tokens that texts begin with are run anew in each: {reason}")
        return None
    return shared


def _try_out(encoder: Encoder, store: TokenStore, shared: Shared, pad_id: int) -> None:
    """Embed the longest and the shortest text with the prefix and whole.

    Raises:
        NotShared: the embeddings differ, or memory runs out.
    """
    length_Q = store.lengths[shared.place_Q]
    pair = shared.place_Q[[int(length_Q.argmax()), int(length_Q.argmin())]]
    own = behind(store, pair, shared.prefix.num_tokens)
    embeddings: list[Tensor] = []

    @torch.no_grad()
    def embed_both() -> None:
        embeddings.append(encoder(pad(store, pair, pad_id)))
        embeddings.append(encoder(pad(own, np.arange(2), pad_id), prefix=shared.prefix))

    name = type(encoder.model).__name__
    if not try_in_memory(embed_both):
        raise NotShared(f"memory ran out where {name} was tried with them run once")
    whole_2D, shared_2D = (torch.nn.functional.normalize(emb_2D, dim=1) for emb_2D in embeddings)
    apart = float((whole_2D - shared_2D).abs().max())
    limit = _MAX_APART.get(encoder.model.dtype, _MAX_APART_16_BIT)
    if not apart <= limit:
        raise NotShared(
            f"with them run once {name} embeds otherwise ({apart:.1e} apart, at most {limit:g} is "
            "rounding)"
        )
