"""The exported tokenizer makes of a prompt and a text what our own token stage makes of the text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowmem_cft.data.tokens import TextFormat, surroundings, tokenize
from lowmem_cft.exporting.tokenizer import prepared_tokenizer
from tiny import tiny_tokenizer
from tokenizer_families import FAMILIES, around

TEXTS = ["the cat sat on the mat .", "a dog ran", "sad", "rain not known", ""]


def exported_ids(
    tokenizer: Any, text_format: TextFormat, texts: list[str], folder: Path | None = None
) -> list[list[int]]:
    """Ids that sentence-transformers gives: the prompt before the text, cut at the length.

    From a folder the tokenizer is read again, as it is when the export is loaded.
    """
    exported = prepared_tokenizer(tokenizer, text_format)
    if folder is not None:
        exported.save_pretrained(folder)
        exported = AutoTokenizer.from_pretrained(folder)
    assert exported.padding_side == "right"
    assert exported.pad_token_id == tokenizer.pad_token_id
    longest = surroundings(tokenizer, text_format).num_tokens + text_format.max_tokens
    ids: list[list[int]] = exported(
        [text_format.head + text for text in texts], truncation=True, max_length=longest
    )["input_ids"]
    return ids


def trained_ids(tokenizer: Any, text_format: TextFormat, texts: list[str]) -> list[list[int]]:
    store = tokenize(tokenizer, texts, text_format)
    return [store[i].tolist() for i in range(len(texts))]


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("template", ["{text}", "the man : {text}", "the {text} is", "{text} ."])
@pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>"])
def test_the_same_tokens(tmp_path: Path, adds: str, template: str, append_eos: bool) -> None:
    tokenizer = around(tiny_tokenizer(), adds)
    text_format = TextFormat(template, append_eos, max_tokens=5)
    texts = TEXTS if adds != "$A" or append_eos or template != "{text}" else TEXTS[:-1]
    trained = trained_ids(tokenizer, text_format, texts)
    assert exported_ids(tokenizer, text_format, texts, tmp_path) == trained
    assert (trained[2][-1] == 2) == append_eos


def test_the_tokenizer_itself_stays_as_it_was() -> None:
    tokenizer = tiny_tokenizer()
    state = tokenizer.backend_tokenizer.to_str()
    prepared_tokenizer(tokenizer, TextFormat("the {text} is", append_eos=True, max_tokens=9))
    assert tokenizer.backend_tokenizer.to_str() == state


# --- many tokenizers, many texts ------------------------------------------------------------------

TEMPLATES = [
    "{text}",
    "query: {text}",
    'This sentence : "{text}" means in one word:"',
    "<turn>user\n{text}<end>\n<turn>assistant\n",
    "  {text}  ",
    "{text}s",
    "\n{text}\n\n",
    "Instruct: find it\nQuery:{text}<end>",
]
PIECES = [
    *("the", "cat", " ", "  ", "\n", "\n\n", '."', "?!", "Ünïcode", "日本語", "\U0001f600", "\t"),
    *("<end>", "<turn>", "<h1>", "<s>", "</s>", "a", ".", "\u200b", "ﬁ", "e\u0301", "A", "\x00"),
]


def random_texts(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    lengths = (generator.choice([0, 1, 2, 3, 8, 30]) for _ in range(count))
    return ["".join(generator.choices(PIECES, k=length)) for length in lengths]


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A <end>", "<s> $A </s>"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_for_any_text(family: str, adds: str, tmp_path: Path) -> None:
    tokenizer = around(FAMILIES[family](), adds)
    texts = [*PIECES, *random_texts(0, 60), "one two three " * 40]
    with_tokens = [text for text in texts if tokenizer(text, add_special_tokens=False)["input_ids"]]
    for number, template in enumerate(TEMPLATES):
        text_format = TextFormat(template, append_eos=number % 3 > 0, max_tokens=7)
        around_it = surroundings(tokenizer, text_format)
        some = texts if around_it.num_tokens else with_tokens
        trained = trained_ids(tokenizer, text_format, some)
        exported = exported_ids(
            tokenizer, text_format, some, None if number else tmp_path / "exported"
        )
        wrong = [ids for ids in zip(some, trained, exported, strict=True) if ids[1] != ids[2]]
        assert not wrong, (template, wrong[0])
        end = [*around_it.tail, *around_it.closing]
        assert all(ids[len(ids) - len(end) :] == end for ids in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_added_tokens_of_a_template_are_read_as_such(family: str) -> None:
    tokenizer: Any = FAMILIES[family]()
    text_format = TextFormat("<turn>user {text}<end>", append_eos=False, max_tokens=20)
    ids = trained_ids(tokenizer, text_format, ["the cat"])[0]
    turn, end = tokenizer.convert_tokens_to_ids(["<turn>", "<end>"])
    assert ids[0] == turn
    assert ids[-1] == end
    assert ids.count(turn) == ids.count(end) == 1


def _unfaithful(tokenizer: Any, text_format: TextFormat) -> Any:
    """The template as a normaliser, which comes before every piece between added tokens."""
    from tokenizers.normalizers import Prepend

    prepared = prepared_tokenizer(tokenizer, text_format)
    prepared.backend_tokenizer.normalizer = Prepend(text_format.head)
    return prepared


def test_the_fuzz_would_notice_a_template_in_the_normaliser() -> None:
    make: Callable[[], Any] = FAMILIES["byte-level BPE"]
    text_format = TextFormat("query: {text}", append_eos=False, max_tokens=99)
    text = "the <turn>cat"
    trained = trained_ids(make(), text_format, [text])[0]
    assert _unfaithful(make(), text_format)(text)["input_ids"] != trained
