"""Tokens that many texts begin with, run once: their keys and values in every layer.

A causal model computes the same for them in each text, so a chunk needs only what comes behind
them: its queries see the prefix's keys and values, and nothing of a chunk is kept for the next.

Shape suffixes: B texts of a chunk, K tokens of the prefix, T padded tokens behind it, A attention
heads of keys and values, D numbers of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_cft.model.adapter import base_model
from lowmem_cft.model.patches import Patches


class NotShared(RuntimeError):
    """A backbone cannot run a prefix once for all texts; the message says why."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that stand before every text of a chunk.

    `cache`: transformers' Cache of K tokens for one text. By `patches` it serves any number of
    texts and keeps none of theirs; with them undone it grows, as in generation.
    """

    num_tokens: int
    cache: Any
    patches: Patches


@dataclass
class ProvenPrefix:
    """How large a prefix was tried on an encoder and found to change no embedding.

    `num_tokens`: of the prefix. `longest`: tokens of the longest text, prefix included.
    """

    num_tokens: int = 0
    longest: int = 0

    def covers(self, num_tokens: int, longest: int) -> bool:
        """Whether one of these sizes need not be tried."""
        return num_tokens <= self.num_tokens and longest <= self.longest

    def set(self, num_tokens: int, longest: int) -> None:
        """Note sizes that were tried."""
        self.num_tokens, self.longest = num_tokens, longest


@torch.no_grad()
def run_prefix(model: Any, ids_K: Tensor) -> Prefix:
    """Run int64 (K,) tokens through a base model, adapter attached, in evaluation mode.

    Raises:
        NotShared: what it keeps of them is more than keys and values, or other.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    num_tokens = len(ids_K)
    output = model(input_ids=ids_K[None], use_cache=True)
    cache = getattr(output, "past_key_values", None)
    name = type(base_model(model)).__name__
    if cache is None:
        raise NotShared(f"{name} keeps no keys and values")
    patches = Patches()
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotShared(f"{name} keeps a {type(layer).__name__}, not keys and values alone")
        window = getattr(layer, "sliding_window", num_tokens + 1)
        in_cache = 0 if layer.keys is None or layer.keys.ndim != 4 else layer.keys.shape[2]
        if in_cache != min(num_tokens, window - 1) or layer.get_seq_length() != num_tokens:
            raise NotShared(f"{name} keeps {in_cache} of {num_tokens} tokens' keys and values")
        patches.install(layer, "update", partial(_behind, layer.keys, layer.values))
    return Prefix(num_tokens, cache, patches)


def _behind(
    key_1AKD: Tensor,
    value_1AKD: Tensor,
    key_BATD: Tensor,
    value_BATD: Tensor,
    *others: Any,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, A, K + T, D) of prefix and chunk: a cache layer's `update` that keeps none.

    One layer's are joined at a time, and are gone when the layer is done.
    """
    return _joined(key_1AKD, key_BATD), _joined(value_1AKD, value_BATD)


def _joined(prefix_1AKD: Tensor, x_BATD: Tensor) -> Tensor:
    return torch.cat([prefix_1AKD.expand(x_BATD.shape[0], -1, -1, -1), x_BATD], dim=2)
