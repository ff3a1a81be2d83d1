"""Tokens: templates, truncation, the end token; the cache; chunks of least cost; padding."""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lowmem_cft.data import tokens
from lowmem_cft.data.chunks import TokenBatch, chunk_by_tokens, pad, token_positions
from lowmem_cft.data.tokens import (
    TextFormat,
    TokenStore,
    adds_eos,
    overhead,
    tokenize,
    tokenize_cached,
)
from lowmem_cft.files import cache_folder, whole_folder
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
    assert tokenizer("cat")["input_ids"].count(EOS) == ("eos" in adds) == adds_eos(tokenizer)
    assert lists(tokenize(tokenizer, TEXTS, text_format)) == wanted
    assert overhead(tokenizer, text_format) + 4 == len(wanted[-1])


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
    text_format = TextFormat(f"{head}{{text}}{tail}", True, limit)
    ids = tokenize(byte_tokenizer, [text], text_format)[0].tolist()
    num_own = len(byte_tokenizer(text, add_special_tokens=False)["input_ids"])
    tail_ids = byte_tokenizer(tail, add_special_tokens=False)["input_ids"]
    eos = byte_tokenizer.eos_token_id
    assert len(ids) <= overhead(byte_tokenizer, text_format) + limit
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
    assert len(ids) <= overhead(byte_tokenizer, text_format) + 5


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


@pytest.mark.parametrize("texts", [[], [""]], ids=["no texts", "no tokens"])
def test_nothing_is_cached_too(tmp_path: Path, texts: list[str]) -> None:
    bare = TextFormat("{text}", False, 4)
    for hit in (False, True):
        store, from_cache = tokenize_cached(word_tokenizer(), texts, bare, tmp_path)
        assert from_cache == hit
        assert lists(store) == [[] for _ in texts]


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


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }


def fill(target: Path, **files: str) -> None:
    with whole_folder(target) as partial:
        assert partial != target
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


def test_whole_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with whole_folder(target) as partial:
        (partial / "a").write_text("1", encoding="utf-8")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/target/a": "1"}


def test_whole_folder_replaces(tmp_path: Path) -> None:
    fill(tmp_path / "target", a="1", b="2")
    fill(tmp_path / "target", b="3", c="4")
    assert contents(tmp_path) == {"target/b": "3", "target/c": "4"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True], ids=["new", "existing"])
def test_whole_folder_that_fails(tmp_path: Path, before: bool, error: type[BaseException]) -> None:
    if before:
        fill(tmp_path / "target", a="1")

    def fail() -> None:
        with whole_folder(tmp_path / "target") as partial:
            (partial / "a").write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == ({"target/a": "1"} if before else {})
    assert len(list(tmp_path.iterdir())) == before


def test_whole_folder_keeps_the_target_when_renaming_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "target", a="1")
    real = Path.rename
    refused: list[str] = []

    def rename(self: Path, to: Path) -> Path:
        if self.suffix == ".partial":
            refused.append(self.name)
            raise OSError("no")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"):
        fill(tmp_path / "target", a="2")
    assert refused == [f"target.{os.getpid()}.partial"]
    assert contents(tmp_path) == {"target/a": "1"}
    assert len(list(tmp_path.iterdir())) == 1


def test_whole_folder_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    nobody = 2**22 + 1  # above the greatest process number Linux gives
    for name in (f"target.{nobody}.partial", "target.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("x", encoding="utf-8")
    fill(tmp_path / "target", a="1")
    assert contents(tmp_path) == {"target/a": "1"}
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_CFT_CACHE", str(tmp_path / "given"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "given"
    monkeypatch.delenv("LOWMEM_CFT_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "lowmem-cft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "lowmem-cft"


# --- chunks -----------------------------------------------------------------------------------


def cost_of(chunks: Sequence[Lengths], lengths: Lengths, chunk_cost: int) -> int:
    widths = [max(1, int(lengths[chunk].max())) for chunk in chunks]
    return sum(len(c) * width + chunk_cost for c, width in zip(chunks, widths, strict=True))


def padded_tokens(chunks: Sequence[Lengths], lengths: Lengths) -> int:
    return cost_of(chunks, lengths, 0)


def least_cost(lengths: Lengths, budget: int, chunk_cost: int) -> int:
    """Over every way to cut the texts, longest first, into chunks within the budget."""
    longest_first: list[int] = sorted(lengths.tolist(), reverse=True)
    found = []
    for cuts in itertools.product([False, True], repeat=len(longest_first) - 1):
        ends = [*(i + 1 for i, cut in enumerate(cuts) if cut), len(longest_first)]
        parts = [longest_first[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if all(len(part) == 1 or len(part) * part[0] <= budget for part in parts):
            found.append(sum(len(part) * part[0] + chunk_cost for part in parts))
    return min(found)


def realistic_lengths(num_texts: int, seed: int = 0) -> Lengths:
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(3, 0.6, num_texts), 1, 128).astype(np.int64)


@pytest.mark.parametrize("chunk_cost", [0, 1, 5, 32])
def test_chunks_cost_least(chunk_cost: int) -> None:
    draw = np.random.default_rng(chunk_cost)
    num_cut = 0
    for _ in range(150):
        lengths = draw.integers(1, 15, draw.integers(1, 9))
        budget = int(draw.integers(5, 60))
        chunks = chunk_by_tokens(lengths, budget, chunk_cost)
        num_cut += 1 < len(chunks) < len(lengths)
        wanted = least_cost(lengths, budget, chunk_cost)
        assert cost_of(chunks, lengths, chunk_cost) == wanted, (lengths.tolist(), budget)
    assert num_cut > 20


def test_a_chunk_may_end_inside_a_run_of_equal_lengths() -> None:
    lengths = np.array([5, 2, 2, 1, 5, 7])
    chunks = chunk_by_tokens(lengths, 20, chunk_cost=32)
    assert [lengths[chunk].tolist() for chunk in chunks] == [[7, 5], [5, 2, 2, 1]]


@pytest.mark.parametrize("chunk_cost", [0, 32, 10**6])
@pytest.mark.parametrize("budget", [1, 100, 1024, 10**6])
def test_chunks_hold_every_text_once_longest_first(budget: int, chunk_cost: int) -> None:
    lengths = realistic_lengths(700)
    lengths[:5] = 0
    chunks = chunk_by_tokens(lengths, budget, chunk_cost)
    flat = np.concatenate(chunks)
    assert sorted(flat.tolist()) == list(range(700))
    assert bool((np.diff(lengths[flat]) <= 0).all())
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * lengths[chunk].max() <= budget
    assert all(chunk.dtype == np.int64 for chunk in chunks)


def test_a_text_beyond_the_budget_is_alone() -> None:
    lengths = np.array([3, 50, 3, 40])
    chunks = [chunk.tolist() for chunk in chunk_by_tokens(lengths, 10)]
    assert chunks == [[1], [3], [0, 2]]


def test_no_texts_no_chunks() -> None:
    assert chunk_by_tokens(np.empty(0, dtype=np.int64), 100) == []


@pytest.mark.parametrize("num_texts", [768, 5000])
def test_padding_is_a_small_share(num_texts: int) -> None:
    lengths = realistic_lengths(num_texts)
    chunks = chunk_by_tokens(lengths, 4096)
    padded, real = padded_tokens(chunks, lengths), int(lengths.sum())
    assert padded <= 1.06 * real
    unsorted = np.array_split(np.arange(num_texts), len(chunks))
    assert padded_tokens(unsorted, lengths) > 2 * real, "these lengths need no sorting"


def test_chunk_cost_trades_padding_for_chunks() -> None:
    lengths = realistic_lengths(300)
    plans = [chunk_by_tokens(lengths, 2048, cost) for cost in (0, 8, 32, 128, 10**6)]
    counts = [len(plan) for plan in plans]
    padded = [padded_tokens(plan, lengths) for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert padded == sorted(padded)
    assert len(set(counts)) == len(set(padded)) == 5
    assert padded[0] == lengths.sum()
    greedy, left = 0, sorted(lengths.tolist(), reverse=True)
    while left:
        left = left[max(1, 2048 // left[0]) :]
        greedy += 1
    assert counts[-1] == greedy


def test_chunks_are_the_same_in_two_runs() -> None:
    lengths = realistic_lengths(300)
    first, second = (chunk_by_tokens(lengths, 512) for _ in range(2))
    assert [chunk.tolist() for chunk in first] == [chunk.tolist() for chunk in second]
    # equal lengths keep their order
    for chunk_cost in (0, 32):
        equal = chunk_by_tokens(np.full(10, 4), 12, chunk_cost)
        assert np.concatenate(equal).tolist() == list(range(10))
        assert sorted(map(len, equal)) == [1, 3, 3, 3]


# --- padding ----------------------------------------------------------------------------------

STORE = TokenStore.from_lists([[5, 6], [7], [8, 9, 10], [11, 12, 13, 14]])


def test_pad_right() -> None:
    batch = pad(STORE, np.array([2, 0, 1]), pad_id=3)
    assert batch.ids_BT.tolist() == [[8, 9, 10], [5, 6, 3], [7, 3, 3]]
    assert batch.mask_BT.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert (batch.ids_BT.dtype, batch.mask_BT.dtype) == (torch.int64, torch.bool)


def test_pad_left() -> None:
    batch = pad(STORE, np.array([2, 0, 1]), pad_id=3, side="left")
    assert batch.ids_BT.tolist() == [[8, 9, 10], [3, 5, 6], [3, 3, 7]]
    assert batch.mask_BT.int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_a_text_may_hold_the_padding_token() -> None:
    batch = pad(STORE, np.array([0, 1]), pad_id=6)
    assert batch.mask_BT.int().tolist() == [[1, 1], [1, 0]]


def test_batch_moves() -> None:
    batch = pad(STORE, np.array([0, 1]), pad_id=3).to(torch.device("meta"))
    assert isinstance(batch, TokenBatch)
    assert batch.ids_BT.device.type == batch.mask_BT.device.type == "meta"


def test_positions_start_at_the_first_real_token() -> None:
    left = pad(STORE, np.array([2, 0, 1]), pad_id=3, side="left").mask_BT
    right = pad(STORE, np.array([2, 0, 1]), pad_id=3).mask_BT
    assert token_positions(left).dtype == torch.int64
    assert token_positions(left).tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 0]]
    for mask_BT in (left, right):
        found = [
            row[real].tolist() for row, real in zip(token_positions(mask_BT), mask_BT, strict=True)
        ]
        assert found == [[0, 1, 2], [0, 1], [0]]


@pytest.mark.parametrize("chunk_cost", [32, 512])  # a CPU's, a GPU's
def test_padding_of_real_text_is_small(data_folder: Path, chunk_cost: int) -> None:
    """Logical batch 1024, budget 2048, words and marks for tokens: at most 5 % padding."""
    with gzip.open(data_folder / "nli" / "nli_triplets.tsv.gz", "rt", encoding="utf-8") as file:
        rows = list(islice(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1024))
    texts = [row[key] for row in rows for key in ("anchor", "positive", "negative")]
    lengths = np.array([len(re.findall(r"\w+|[^\w\s]", text)) + 1 for text in texts])
    assert len(lengths) == 3072
    chunks = chunk_by_tokens(lengths, 2048, chunk_cost)
    padded = sum(len(chunk) * lengths[chunk].max() for chunk in chunks)
    assert padded <= 1.05 * lengths.sum()
