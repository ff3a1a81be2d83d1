"""The exported tokenizer makes of a plain text what our own token stage makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowmem_cft.data.tokens import TextFormat, tokenize
from lowmem_cft.exporting.tokenizer import prepared_tokenizer
from tiny import tiny_tokenizer

TEXTS = ["the cat sat on the mat .", "a dog ran", "sad", "rain not known"]


def with_special_tokens(adds: str) -> Any:
    """Puts <s> before a text or </s> behind it by itself."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    single = {"nothing": "$A", "bos": "<s> $A", "bos eos": "<s> $A </s>"}[adds]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize("template", ["{text}", "the man : {text}", "the {text} is", "{text} ."])
@pytest.mark.parametrize("adds", ["nothing", "bos", "bos eos"])
def test_the_same_tokens(tmp_path: Path, adds: str, template: str, append_eos: bool) -> None:
    tokenizer = with_special_tokens(adds)
    text_format = TextFormat(template, append_eos, max_tokens=32)
    store = tokenize(tokenizer, TEXTS, text_format)
    prepared_tokenizer(tokenizer, text_format).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS)["input_ids"] == [store[i].tolist() for i in range(len(TEXTS))]
    assert loaded.padding_side == "right"
    assert loaded.pad_token_id == tokenizer.pad_token_id
    assert (store[2][-1] == 2) == append_eos


def test_the_tokenizer_itself_stays_as_it_was() -> None:
    tokenizer = tiny_tokenizer()
    state = tokenizer.backend_tokenizer.to_str()
    prepared_tokenizer(tokenizer, TextFormat("the {text} is", append_eos=True, max_tokens=9))
    assert tokenizer.backend_tokenizer.to_str() == state
