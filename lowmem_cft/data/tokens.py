"""Texts -> tokens, once, before training: templates, truncation, the disk cache.

    opening special tokens, head + text, tail, closing special tokens

The template's head becomes tokens together with the text, so that merges across the seam are the
model's own; its tail by itself, which an exported tokenizer repeats for any text, or together with
the text too. Truncation counts the text's own tokens and never reaches what follows them.

Shape suffixes: B texts of a chunk, T padded tokens.
"""

from __future__ import annotations

import hashlib
import itertools
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
    """How one role's texts become tokens; see `TextSection` for the fields.

    `joined`: the template's tail becomes tokens together with the text.
    """

    template: str
    append_eos: bool
    max_tokens: int
    joined: bool = False

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


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that a tokenizer itself puts before and behind every text."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """What the tokenizer puts around a text, found by encoding one.

    Raises:
        ValueError: it does more to a text than to put tokens around it.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = (i for i in range(len(tokenizer)) if i not in special)
    for probe in ("a", *(tokenizer.decode([i]) for i in itertools.islice(ordinary, 100))):
        own = _ids_of(tokenizer, probe)
        if not own:  # no token of the vocabulary
            continue
        whole = tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(own) + 1):
            end = start + len(own)
            if whole[start:end] == own:
                return SpecialTokens(tuple(whole[:start]), tuple(whole[end:]))
        break
    raise ValueError(
        f"{type(tokenizer).__name__} does more to a text than to put special tokens around it; "
        "take a model whose tokenizer does not"
    )


def set_special_tokens(tokenizer: Tokenizer, opening: list[int], closing: list[int]) -> None:
    """Have a tokenizer put these ids before and behind every text, in place of its own."""
    from tokenizers.processors import TemplateProcessing

    single, special = ["$A"], []
    if opening:
        single.insert(0, "opening")
        special.append(_named_ids(tokenizer, "opening", opening))
    if closing:
        single.append("closing")
        special.append(_named_ids(tokenizer, "closing", closing))
    processor = TemplateProcessing(single=single, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = processor


def _named_ids(tokenizer: Tokenizer, name: str, ids: list[int]) -> dict[str, Any]:
    return {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}


@dataclass(frozen=True)
class Surroundings:
    """What stands around every text under a format.

    `opening`, `tail`, `closing`: token ids; `tail` is empty where the format joins it to the text.
    `num_head`: tokens of the template's head.
    `num_tail`: tokens of its tail.
    """

    opening: list[int]
    tail: list[int]
    closing: list[int]
    num_head: int
    num_tail: int

    @property
    def num_tokens(self) -> int:
        """Tokens that come on top of a text's own."""
        return len(self.opening) + self.num_head + self.num_tail + len(self.closing)


def surroundings(tokenizer: Tokenizer, text_format: TextFormat) -> Surroundings:
    """What stands around every text.

    Raises:
        ValueError: the format wants an end-of-sequence token and the tokenizer has none, or the
            tokenizer has no fast version.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no fast version (tokenizer.json needed)")
    special = special_tokens(tokenizer)
    closing: list[int] = []
    if text_format.append_eos:
        closing = list(special.closing) or _end_of_sequence(tokenizer)
    head, tail = text_format.head, text_format.tail
    num_head = len(_ids_of(tokenizer, head))
    if text_format.joined:
        num_tail = len(_ids_of(tokenizer, head + tail)) - num_head
        return Surroundings(list(special.opening), [], closing, num_head, num_tail)
    tail_ids = _ids_behind_a_text(tokenizer, tail)
    return Surroundings(list(special.opening), tail_ids, closing, num_head, len(tail_ids))


def _end_of_sequence(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "text.append_eos: got true, but this model's tokenizer has no end-of-sequence token; "
            "set text.append_eos: false and embedding.pooling: last"
        )
    return [tokenizer.eos_token_id]


def _ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text without special tokens around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _ids_behind_a_text(tokenizer: Tokenizer, tail: str) -> list[int]:
    """Ids of what follows a text: without the blank that some tokenizers put before a first word."""
    letter = _ids_of(tokenizer, "a")
    both = _ids_of(tokenizer, f"a{tail}")
    if tail and both[: len(letter)] == letter:
        return both[len(letter) :]
    return _ids_of(tokenizer, tail)


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
        ValueError: the tokenizer cannot do what the format says, see `surroundings`; or a text has
            no tokens.
    """
    around = surroundings(tokenizer, text_format)
    head = text_format.head
    joined_tail = text_format.tail if text_format.joined else ""
    limit = around.num_head + text_format.max_tokens

    def encode(batch: Sequence[str]) -> list[list[int]]:
        whole = [head + text + joined_tail for text in batch]
        encoded = tokenizer(
            whole, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    token_lists: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        encoded = encode(batch)
        if joined_tail:
            long = [i for i, ids in enumerate(encoded) if len(ids) > limit]
            cut = [_cut_text(tokenizer, batch[i], text_format.max_tokens) for i in long]
            for i, ids in zip(long, encode(cut) if cut else [], strict=True):
                encoded[i] = ids
        else:
            encoded = [ids[:limit] for ids in encoded]
        token_lists.extend(
            [*around.opening, *ids, *around.tail, *around.closing] for ids in encoded
        )
    empty = next((i for i, ids in enumerate(token_lists) if not ids), None)
    if empty is not None:
        raise ValueError(
            f"{texts[empty]!r} has no tokens and nothing stands around it, so it cannot be embedded; "
            "set text.append_eos: true, or leave it out"
        )
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
    return _format_of(recipe, recipe.text.template)


def document_format(recipe: Recipe) -> TextFormat:
    """How positives and negatives become tokens."""
    return _format_of(recipe, recipe.text.document_template or recipe.text.template)


def _format_of(recipe: Recipe, template: str) -> TextFormat:
    text = recipe.text
    return TextFormat(template, text.append_eos, text.max_tokens, text.tail == "joined")
