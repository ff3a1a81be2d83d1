"""Tiny models whose tokens see those behind them: encoders, and decoders made bidirectional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowmem_cft.model.configs import base_model_kwargs, disable_base_dropout
from tiny import SIZES

WINDOW = 6
_WIDTHS = {**SIZES, "intermediate_size": 128}
_GROUPED = {**_WIDTHS, "num_key_value_heads": 2}


def _decoder(maker: str, **values: Any) -> Callable[[], Any]:
    """A decoder's configuration that says `is_causal: false`, which transformers itself heeds."""

    def make() -> Any:
        import transformers as t

        config = getattr(t, maker)(**_GROUPED, **values)
        config.is_causal = False
        return config

    return make


def _encoder(maker: str, **values: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers as t

        return getattr(t, maker)(**{**_WIDTHS, **values})

    return make


BIDIRECTIONAL: dict[str, Callable[[], Any]] = {
    "bert": _encoder("BertConfig"),
    "xlm-roberta": _encoder("XLMRobertaConfig"),
    "modernbert": _encoder("ModernBertConfig", local_attention=WINDOW),
    "distilbert": _encoder("DistilBertConfig", dim=64, n_layers=3, n_heads=4, hidden_dim=128),
    "mpnet": _encoder("MPNetConfig"),
    "deberta-v2": _encoder(
        "DebertaV2Config", relative_attention=True, position_buckets=16, pos_att_type=["c2p", "p2c"]
    ),
    "gemma-3": _encoder(
        "Gemma3TextConfig",
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
    ),
    "llama": _decoder("LlamaConfig"),
    "qwen2": _decoder("Qwen2Config"),
    "mistral": _decoder("MistralConfig", sliding_window=WINDOW),
}


def build(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """A random base model of a configuration, its dropout off, in which every token counts."""
    from transformers import AutoModel

    torch.manual_seed(0)
    disable_base_dropout(config)
    model = AutoModel.from_config(config, **base_model_kwargs(config)).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model
