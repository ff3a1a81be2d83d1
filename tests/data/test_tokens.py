"""Tokens: templates, truncation, the end token, the store and the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lowmem_cft.data import tokens
from lowmem_cft.data.tokens import (
    TextFormat,
    TokenStore,
    special_tokens,
    surroundings,
    tokenize,
    tokenize_cached,
)
from tiny import WORDS, tiny_tokenizer

Lengths = npt.NDArray[np.int64]

BOS, EOS = 1, 2
IDS = {word: 4 + i for i, word in enumerate(WORDS)}


def ids_of(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def word_tokenizer(adds: str = "") -> Any:
    """Words as tokens; `adds` names the special tokens that it puts around every text by itself."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    single = [
        *(["<s>"] if "bos" in adds else []),
        "$A",
        *(["</s>"] if "eos" in adds else []),
    ]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """Byte-level BPE with merges over blanks; a character outside its texts is several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = ["the cat sat on the mat", "Query: the big red house", 'in one word: "happy"']
    backend.train_from_iterator(lines * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def lists(store: TokenStore) -> list[list[int]]:
    return [store[i].tolist() for i in range(len(store))]


# --- tokenize ---------------------------------------------------------------------------------

TEXTS = ["cat", "the big red cat", "the big red cat sat", "the big red cat sat on the mat " * 40]


@pytest.mark.parametrize("append_eos", [True, False], ids=["append eos", "no eos"])
@pytest.mark.parametrize("adds", ["", "bos", "eos", "bos eos"], ids=lambda a: f"adds {a or 'none'}")
@pytest.mark.parametrize(
    ("head", "tail"),
    [("", ""), ("a small ", ""), ("", " is happy ."), ("a small ", " is happy .")],
    ids=["bare", "head", "tail", "head and tail"],
)
def test_tokens_of_a_template(head: str, tail: str, adds: str, append_eos: bool) -> None:
    text_format = TextFormat(f"{head}{{text}}{tail}", append_eos, max_tokens=4)
    tokenizer = word_tokenizer(adds)
    start = [BOS] if "bos" in adds else []
    end = [EOS] if append_eos else []
    wanted = [[*start, *ids_of(head), *ids_of(text)[:4], *ids_of(tail), *end] for text in TEXTS]
    assert [len(ids_of(text)) for text in TEXTS] == [1, 4, 5, 320]
    assert special_tokens(tokenizer).closing == ((EOS,) if "eos" in adds else ())
    assert lists(tokenize(tokenizer, TEXTS, text_format)) == wanted
    assert surroundings(tokenizer, text_format).num_tokens + 4 == len(wanted[-1])


def test_limit_of_one_token() -> None:
    text_format = TextFormat("a {text} .", True, max_tokens=1)
    assert lists(tokenize(word_tokenizer(), ["cat sat"], text_format)) == [
        [*ids_of("a cat ."), EOS]
    ]


@pytest.mark.parametrize("tail", ["", " ."], ids=["no tail", "tail"])
def test_calls_of_few_texts_change_nothing(monkeypatch: pytest.MonkeyPatch, tail: str) -> None:
    texts = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(20)]
    text_format = TextFormat(f"a {{text}}{tail}", True, max_tokens=4)
    wanted = tokenize(word_tokenizer("bos"), texts, text_format)
    monkeypatch.setattr(tokens, "_BATCH", 3)
    got = tokenize(word_tokenizer("bos"), texts, text_format)
    assert len(got) == 20
    assert lists(got) == lists(wanted)
    assert set(wanted.lengths.tolist()) > {4 + bool(tail), 7 + bool(tail)}


AWKWARD = {
    "one word": "cat",
    "words": "the cat sat on the mat the cat sat on the mat",
    "emoji first": "\U0001f600\U0001f600\U0001f600\U0001f600 the",
    "emoji last": "the \U0001f600\U0001f600\U0001f600\U0001f600",
    "japanese": "日本語日本語",
    "blanks": "  the   cat\n\nsat  ",
    "no merges": "x" * 50,
    "thousands of tokens": "the cat sat on the mat \U0001f600 " * 300,
}


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_bytes_as_tokens_never_pass_the_limit(byte_tokenizer: Any, text: str, limit: int) -> None:
    head, tail = "Query: ", '\nin one word: "'
    text_format = TextFormat(f"{head}{{text}}{tail}", True, limit, joined=True)
    ids = tokenize(byte_tokenizer, [text], text_format)[0].tolist()
    num_own = len(byte_tokenizer(text, add_special_tokens=False)["input_ids"])
    tail_ids = byte_tokenizer(tail, add_special_tokens=False)["input_ids"]
    eos = byte_tokenizer.eos_token_id
    assert len(ids) <= surroundings(byte_tokenizer, text_format).num_tokens + limit
    assert ids[0] == byte_tokenizer.bos_token_id
    assert ids.count(eos) == 1
    assert ids[-len(tail_ids) - 1 :] == [*tail_ids, eos]
    decoded = byte_tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)
    assert decoded.startswith(head)
    assert decoded.endswith(tail)
    kept = decoded[len(head) : -len(tail)]
    assert text.startswith(kept)
    assert (kept == text) == (num_own <= limit)


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_without_a_tail_the_first_tokens_stay(byte_tokenizer: Any, text: str) -> None:
    text_format = TextFormat("Query: {text}", True, 5)
    ids = tokenize(byte_tokenizer, [text], text_format)[0].tolist()
    whole = byte_tokenizer(f"Query: {text}")["input_ids"]
    assert ids == [*whole[: len(byte_tokenizer("Query: ")["input_ids"]) + 5], 1]
    assert len(ids) <= surroundings(byte_tokenizer, text_format).num_tokens + 5


def test_a_text_without_any_token_is_refused() -> None:
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match="'' has no tokens and nothing stands around it"):
        tokenize(tokenizer, ["cat", ""], TextFormat("{text}", False, 4))
    assert lists(tokenize(tokenizer, [""], TextFormat("{text}", True, 4))) == [[EOS]]


def test_the_tokenizers_own_closing_token_is_the_one() -> None:
    """As Qwen3-Embedding's, which closes a text by another token than its `eos_token`."""
    tokenizer = word_tokenizer("bos eos")
    tokenizer.eos_token = "<pad>"
    assert special_tokens(tokenizer).opening == (BOS,)
    for max_tokens in (1, 9):  # cut and whole
        text_format = TextFormat("{text}", True, max_tokens)
        ids = lists(tokenize(tokenizer, ["cat dog"], text_format))[0]
        assert ids == [BOS, *ids_of("cat dog")[:max_tokens], EOS]
    bare = lists(tokenize(tokenizer, ["cat dog"], TextFormat("{text}", False, 9)))[0]
    assert bare == [BOS, *ids_of("cat dog")]


def test_special_tokens_that_are_not_around_the_text() -> None:
    class Twice:
        all_special_ids = ()

        def __len__(self) -> int:
            return 3

        def decode(self, ids: list[int]) -> str:
            return "b"

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
            return {"input_ids": [1, 0, 2] if add_special_tokens else [1, 2]}

    with pytest.raises(ValueError, match="does more to a text than to put special tokens around"):
        special_tokens(Twice())


def test_a_tail_apart_is_the_same_behind_every_text(byte_tokenizer: Any) -> None:
    apart = TextFormat('in one word: "{text}":"', False, 5)
    tail = surroundings(byte_tokenizer, apart).tail
    assert byte_tokenizer.decode(tail) == '":"'
    texts = ["the cat", 'the "cat"', "", "the cat sat on the mat the cat sat on", "\U0001f600" * 9]
    for ids in lists(tokenize(byte_tokenizer, texts, apart)):
        assert ids[-len(tail) :] == tail
    joined = TextFormat(apart.template, False, 5, joined=True)
    whole = byte_tokenizer('in one word: "the cat":"')["input_ids"]
    assert lists(tokenize(byte_tokenizer, ["the cat"], joined))[0] == whole


def test_no_texts() -> None:
    store = tokenize(word_tokenizer(), [], TextFormat("{text}", True, 4))
    assert len(store) == 0
    assert store.offsets.tolist() == [0]


def test_no_end_token() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"text.append_eos: got true, .* no end-of-sequence token"):
        tokenize(tokenizer, ["cat"], TextFormat("{text}", True, 4))
    assert lists(tokenize(tokenizer, ["cat"], TextFormat("{text}", False, 4))) == [ids_of("cat")]


def test_no_fast_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"SimpleNamespace has no fast version .tokenizer.json"):
        tokenize(
            SimpleNamespace(is_fast=False, eos_token_id=2), ["cat"], TextFormat("{text}", True, 4)
        )


# --- the store --------------------------------------------------------------------------------


def test_store_holds_lists() -> None:
    given = [[5, 6, 7], [], [8]]
    store = TokenStore.from_lists(given)
    assert lists(store) == given
    assert store.lengths.tolist() == [3, 0, 1]
    assert (str(store.ids.dtype), str(store.offsets.dtype)) == ("int32", "int64")


def test_concatenate() -> None:
    parts = [[[1, 2], [3]], [], [[4], [], [5, 6, 7]]]
    store = TokenStore.concatenate([TokenStore.from_lists(part) for part in parts])
    assert lists(store) == [[1, 2], [3], [4], [], [5, 6, 7]]
    assert (str(store.ids.dtype), str(store.offsets.dtype)) == ("int32", "int64")


# --- the cache --------------------------------------------------------------------------------

FORMAT = TextFormat("a {text} .", True, 4)
CAT_DOG = ["the cat sat", "the dog", "a big red house in the rain"]


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "tokens").iterdir())


def test_hit_equals_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, from_cache = tokenize_cached(word_tokenizer(), CAT_DOG, FORMAT, tmp_path)
    assert not from_cache
    assert len(entries(tmp_path)) == 1

    def refuse(*_: object) -> TokenStore:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "tokenize", refuse)
    read, from_cache = tokenize_cached(word_tokenizer(), list(CAT_DOG), FORMAT, tmp_path)
    assert from_cache
    assert lists(read) == lists(made) == lists(tokenize(word_tokenizer(), CAT_DOG, FORMAT))
    assert (read.ids.dtype, read.offsets.dtype) == (made.ids.dtype, made.offsets.dtype)
    assert len(entries(tmp_path)) == 1


def another_vocabulary() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["zebra"])
    return tokenizer


def another_end() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<pad>"
    return tokenizer


OTHER: dict[str, Callable[[], tuple[Any, list[str], TextFormat]]] = {
    "template": lambda: (word_tokenizer(), CAT_DOG, TextFormat("the {text} .", True, 4)),
    "end token wish": lambda: (word_tokenizer(), CAT_DOG, TextFormat("a {text} .", False, 4)),
    "limit": lambda: (word_tokenizer(), CAT_DOG, TextFormat("a {text} .", True, 5)),
    "text": lambda: (word_tokenizer(), [*CAT_DOG[:2], "a cat"], FORMAT),
    "order": lambda: (word_tokenizer(), CAT_DOG[::-1], FORMAT),
    "one text less": lambda: (word_tokenizer(), CAT_DOG[:2], FORMAT),
    "one text more": lambda: (word_tokenizer(), [*CAT_DOG, ""], FORMAT),
    "texts joined": lambda: (word_tokenizer(), ["\0".join(CAT_DOG)], FORMAT),
    "other seam": lambda: (word_tokenizer(), ["the cat", " satthe dog", CAT_DOG[2]], FORMAT),
    "added tokens": lambda: (word_tokenizer("bos"), CAT_DOG, FORMAT),
    "vocabulary": lambda: (another_vocabulary(), CAT_DOG, FORMAT),
    "end token": lambda: (another_end(), CAT_DOG, FORMAT),
}


@pytest.mark.parametrize("other", OTHER)
def test_other_content_is_another_entry(tmp_path: Path, other: str) -> None:
    tokenize_cached(word_tokenizer(), CAT_DOG, FORMAT, tmp_path)
    tokenizer, texts, text_format = OTHER[other]()
    got, from_cache = tokenize_cached(tokenizer, texts, text_format, tmp_path)
    assert not from_cache
    assert len(entries(tmp_path)) == 2
    assert lists(got) == lists(tokenize(tokenizer, texts, text_format))
    assert tokenize_cached(word_tokenizer(), CAT_DOG, FORMAT, tmp_path)[1]


def test_nothing_is_cached_too(tmp_path: Path) -> None:
    for hit in (False, True):
        store, from_cache = tokenize_cached(word_tokenizer(), [], FORMAT, tmp_path)
        assert from_cache == hit
        assert lists(store) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("after", [0, 1], ids=["first file", "second file"])
def test_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: int
) -> None:
    saved: list[Path] = []
    real = np.save

    def save(path: Path, array: npt.NDArray[Any]) -> None:
        if len(saved) == after:
            path.write_bytes(b"half")
            raise error
        real(path, array)
        saved.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        with pytest.raises(error):
            tokenize_cached(word_tokenizer(), CAT_DOG, FORMAT, tmp_path)
    assert len(saved) == after
    assert entries(tmp_path) == []
    _, from_cache = tokenize_cached(word_tokenizer(), CAT_DOG, FORMAT, tmp_path)
    assert not from_cache
    assert tokenize_cached(word_tokenizer(), CAT_DOG, FORMAT, tmp_path)[1]
