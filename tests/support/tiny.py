"""Tiny backbones of every supported family, with a tiny tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = [
    "the",
    "a",
    "and",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "ran",
    "in",
    "house",
    "big",
    "small",
    "red",
    "blue",
    "one",
    "two",
    "three",
    "man",
    "woman",
    "is",
    "was",
    "not",
    "happy",
    "sad",
    "runs",
    "quickly",
    "slowly",
    "over",
    "under",
    "tree",
    "river",
    "road",
    "rain",
    "sun",
    ".",
]


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def tiny_config(family: str) -> Any:
    """A small random configuration of a family, every dropout of its base set to 0.1 if it has one."""
    import transformers as t

    llama = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
    makers = {
        "llama": lambda: t.LlamaConfig(**llama),
        "smollm": lambda: t.LlamaConfig(**llama, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**llama, head_dim=16),
        "gemma": lambda: t.GemmaConfig(**llama, head_dim=16),
        "minicpm": lambda: t.GraniteConfig(
            **llama,
            embedding_multiplier=12.0,
            residual_multiplier=1.4 / 3**0.5,
            attention_multiplier=16**-0.5,
        ),
        "phi-2": lambda: t.PhiConfig(**SIZES, intermediate_size=128, partial_rotary_factor=0.5),
        "opt": lambda: t.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64),
    }
    return makers[family]()


FAMILIES = ("llama", "smollm", "qwen3", "gemma", "minicpm", "phi-2", "opt")


def tiny_tokenizer() -> Any:
    """Words as tokens, with special tokens at the ids of `SIZES`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def save_tiny(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model with its tokenizer as a folder that `from_pretrained` loads."""
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(tiny_config(family)).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)  # biases, so that they count
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
