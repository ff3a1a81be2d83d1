"""Texts -> tokens, once, before training: templates, truncation, the disk cache.

A template is tokenised together with its text, as the papers do it, so that merges across the
seam are the model's own. Truncation counts the text's own tokens and never reaches the template's
tail or the end-of-sequence token.

Shape suffixes: B texts of a chunk, T padded tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowmem_cft.files import whole_folder
from lowmem_cft.recipe.schema import TEXT_SLOT, Recipe

Tokenizer = Any  # transformers' PreTrainedTokenizerBase, which ships no types
Ids = npt.NDArray[np.int32]

_BATCH = 4096  # texts per tokenizer call: enough for its threads, little memory


@dataclass(frozen=True)
class TextFormat:
    """How one role's texts become tokens; see `TextSection` for the fields."""

    template: str
    append_eos: bool
    max_tokens: int

    @property
    def head(self) -> str:
        return self.template.partition(TEXT_SLOT)[0]

    @property
    def tail(self) -> str:
        return self.template.partition(TEXT_SLOT)[2]


@dataclass(frozen=True)
class TokenStore:
    """Token ids of many texts, end to end. `ids` int32 (total,), `offsets` int64 (texts + 1,)."""

    ids: Ids
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Ids:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 (texts,)"""
        return np.diff(self.offsets)

    @classmethod
    def from_lists(cls, token_lists: Sequence[Sequence[int]]) -> TokenStore:
        lengths = np.fromiter((len(ids) for ids in token_lists), np.int64, len(token_lists))
        flat = np.fromiter((i for ids in token_lists for i in ids), np.int32, int(lengths.sum()))
        return cls(flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    @classmethod
    def concatenate(cls, stores: Sequence[TokenStore]) -> TokenStore:
        """The texts of all stores, one after the other."""
        lengths = np.concatenate([store.lengths for store in stores])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(np.concatenate([store.ids for store in stores]), offsets)


def adds_eos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself ends every text with its end-of-sequence token."""
    return bool(tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id)


def overhead(tokenizer: Tokenizer, text_format: TextFormat) -> int:
    """Tokens that come on top of the text's own: special tokens, the template, the appended EOS."""
    empty = tokenizer(text_format.head + text_format.tail)["input_ids"]
    return len(empty) - adds_eos(tokenizer) + text_format.append_eos


def _cut_text(tokenizer: Tokenizer, text: str, max_tokens: int) -> str:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    if len(offsets) <= max_tokens:
        return text
    # of a character that spans several tokens, all of them fit or the character goes
    return text[: min(offsets[max_tokens - 1][1], offsets[max_tokens][0])]


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], text_format: TextFormat) -> TokenStore:
    """Token ids of every text under the format.

    Raises:
        ValueError: the format appends an end-of-sequence token and the tokenizer has none, or
            the tokenizer gives no character offsets.
    """
    if text_format.append_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            "text.append_eos: got true, but this model's tokenizer has no end-of-sequence token; "
            "set text.append_eos: false and embedding.pooling: last"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no fast version (tokenizer.json needed)")
    head, tail, limit = text_format.head, text_format.tail, text_format.max_tokens
    eos = [tokenizer.eos_token_id] if text_format.append_eos else []
    stripped = -1 if adds_eos(tokenizer) else None
    num_head = len(tokenizer(head)["input_ids"][:stripped])

    def encode(batch: Sequence[str]) -> list[list[int]]:
        whole = [head + text + tail for text in batch]
        encoded = tokenizer(whole, return_attention_mask=False, verbose=False)["input_ids"]
        return [ids[:stripped] for ids in encoded]

    token_lists: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        encoded = encode(batch)
        long = [i for i, ids in enumerate(encoded) if len(ids) > num_head + limit]
        if tail and long:
            again = encode([_cut_text(tokenizer, batch[i], limit) for i in long])
            for i, ids in zip(long, again, strict=True):
                encoded[i] = ids
        elif long:
            for i in long:
                encoded[i] = encoded[i][: num_head + limit]
        token_lists.extend(ids + eos for ids in encoded)
    return TokenStore.from_lists(token_lists)


def _fingerprint(tokenizer: Tokenizer, texts: Sequence[str], text_format: TextFormat) -> str:
    digest = hashlib.sha256(repr(text_format).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr(tokenizer.eos_token_id).encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def tokenize_cached(
    tokenizer: Tokenizer, texts: Sequence[str], text_format: TextFormat, cache: Path
) -> tuple[TokenStore, bool]:
    """`tokenize`, read from `cache` (memory-mapped) when it was done before.

    Returns:
        The tokens, and whether they came from the cache. The key is the content: the tokenizer,
        the format and every text.
    """
    folder = cache / "tokens" / _fingerprint(tokenizer, texts, text_format)
    if folder.is_dir():
        ids = np.load(folder / "ids.npy", mmap_mode="r" if texts else None)
        return TokenStore(ids, np.load(folder / "offsets.npy")), True
    store = tokenize(tokenizer, texts, text_format)
    with whole_folder(folder) as partial:
        np.save(partial / "ids.npy", store.ids)
        np.save(partial / "offsets.npy", store.offsets)
    return store, False


def query_format(recipe: Recipe) -> TextFormat:
    """How anchors, and texts to evaluate or embed, become tokens."""
    return TextFormat(recipe.text.template, recipe.text.append_eos, recipe.text.max_tokens)


def document_format(recipe: Recipe) -> TextFormat:
    """How positives and negatives become tokens."""
    template = recipe.text.document_template or recipe.text.template
    return TextFormat(template, recipe.text.append_eos, recipe.text.max_tokens)
