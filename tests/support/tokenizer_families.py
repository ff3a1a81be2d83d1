"""Small tokenizers of every kind in use, trained on a few lines, with added tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<turn>", "<end>"]
LINES = [
    "the cat sat on the mat . query: find a big red house",
    'This sentence : "the dog ran" means in one word:"happy"',
    "Instruct: find it Query: one two three users assistant",
    "Ünïcode 日本語 and others, A B C; what? yes!",
] * 8


def _finished(backend: Tokenizer) -> Any:
    """As a transformers tokenizer, with added tokens that are not special as well."""
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(
        [
            AddedToken("\n\n", normalized=False),  # as Gemma has
            AddedToken("<h1>", normalized=True, lstrip=True),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def _trained(backend: Tokenizer, trainer: Any) -> Any:
    backend.train_from_iterator(LINES, trainer)
    return _finished(backend)


def _bpe(**options: Any) -> Any:
    return trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False, **options
    )


def byte_level_bpe(add_prefix_space: bool = False) -> Any:
    """As GPT-2, OPT, Qwen, Llama 3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, _bpe(initial_alphabet=pre.ByteLevel.alphabet()))


def composed_bpe() -> Any:
    """As Qwen: NFC, and a pattern of its own before the bytes."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    pattern = Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    backend.pre_tokenizer = pre.Sequence(
        [pre.Split(pattern, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return _trained(backend, _bpe(initial_alphabet=pre.ByteLevel.alphabet()))


def sentencepiece_bpe() -> Any:
    """As Llama 2 and Gemma: blanks as letters by a normaliser, a prefix before every piece."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Replace("▁", " ")
    return _trained(backend, _bpe())


def unigram(prepend_scheme: str) -> Any:
    """As XLM-R and T5."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return _trained(backend, trainer)


def word_piece() -> Any:
    """As BERT: small letters, accents gone."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return _trained(backend, trainer)


FAMILIES: dict[str, Any] = {
    "byte-level BPE": byte_level_bpe,
    "byte-level BPE, prefix space": lambda: byte_level_bpe(add_prefix_space=True),
    "BPE, composed letters": composed_bpe,
    "SentencePiece-like BPE": sentencepiece_bpe,
    "Unigram, prefix always": lambda: unigram("always"),
    "Unigram, prefix first": lambda: unigram("first"),
    "Unigram, no prefix": lambda: unigram("never"),
    "WordPiece": word_piece,
}


def around(tokenizer: Any, single: str) -> Any:
    """The tokenizer with special tokens put around every text, as `<s> $A </s>`."""
    names = [name for name in single.split() if name != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single,
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    return tokenizer
