"""The tokenizer of an export does by itself what the recipe says of a text."""

from __future__ import annotations

from lowmem_cft.data.tokens import TextFormat, Tokenizer, adds_eos


def prepared_tokenizer(tokenizer: Tokenizer, text_format: TextFormat) -> Tokenizer:
    """A tokenizer that turns plain texts into the ids our own token stage makes of them."""
    from tokenizers import Regex
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import Normalizer, Prepend, Replace, Sequence
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    steps: list[Normalizer] = []
    if text_format.head:
        steps.append(Prepend(text_format.head))
    if text_format.tail:
        steps.append(Replace(Regex(r"\z"), text_format.tail))
    if steps:
        if backend.normalizer is not None:
            steps.append(backend.normalizer)
        backend.normalizer = Sequence(steps)
    special = tokenizer("")["input_ids"]
    special = special[:-1] if special and adds_eos(tokenizer) else special
    opening = [tokenizer.convert_ids_to_tokens(i) for i in special]
    closing = [tokenizer.eos_token] if text_format.append_eos else []
    named = {token: tokenizer.convert_tokens_to_ids(token) for token in opening + closing}
    backend.post_processor = TemplateProcessing(
        single=[*opening, "$A", *closing], special_tokens=list(named.items())
    )
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    tokens = {key: str(value) for key in names if (value := getattr(tokenizer, key)) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **tokens)
