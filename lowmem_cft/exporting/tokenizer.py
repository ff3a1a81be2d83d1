"""The tokenizer of an export puts around a text what the recipe says."""

from __future__ import annotations

from lowmem_cft.data.tokens import TextFormat, Tokenizer, set_special_tokens, surroundings

_NAMED_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "pad_token"),
    *("cls_token", "sep_token", "mask_token"),
)


def prepared_tokenizer(tokenizer: Tokenizer, text_format: TextFormat) -> Tokenizer:
    """A tokenizer that makes of `head + text` the ids that our own token stage makes of the text.

    Special tokens and the template's tail are put around the text after it has been cut, whatever
    is in it. The head stays a prompt: a tokenizer's file could only put it before every piece that
    added tokens leave of a text.
    """
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    assert not (text_format.tail and text_format.joined), "refused by layout.check_expressible"
    around = surroundings(tokenizer, text_format)
    backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    named = {name: getattr(tokenizer, name) for name in _NAMED_TOKENS}
    prepared = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        **{name: str(token) for name, token in named.items() if token is not None},
    )
    set_special_tokens(prepared, around.opening, [*around.tail, *around.closing])
    return prepared
