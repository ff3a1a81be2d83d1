"""Small models and batches, plans to try on them, and how far their gradients are apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.gpu.options import Options
from lowmem_cft.data.batches import RowTable, StepTexts, step_texts
from lowmem_cft.data.tokens import TokenStore
from lowmem_cft.gradient.plan import StepPlan
from lowmem_cft.model.configs import disable_base_dropout
from lowmem_cft.model.encoder import Encoder
from plain import PAD, with_adapter

FAMILIES = ("llama", "gemma", "phi", "opt", "granite")
POOLING = {"gemma": "mean", "phi": "weighted-mean"}


def small_config(family: str, tiny: bool, *, layers: int = 3, smooth: bool = True) -> Any:
    """A small configuration; besides `tiny`, heads are as wide as those of the real models.

    `smooth`: no ReLU. Where a rounding turns a sign its gradient jumps: 1e-3 in float32.
    """
    import transformers as t

    heads = 2
    width = 16 if tiny else {"llama": 128, "gemma": 256, "phi": 80}.get(family, 64)
    hidden = 128 if family == "gemma" else heads * width
    values: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
    }
    gated = {**values, "intermediate_size": 2 * hidden, "num_key_value_heads": 1}
    makers = {
        "llama": lambda: t.LlamaConfig(**gated),
        "gemma": lambda: t.GemmaConfig(**gated, head_dim=width),
        "phi": lambda: t.PhiConfig(**values, intermediate_size=256, partial_rotary_factor=0.4),
        "opt": lambda: t.OPTConfig(
            **values,
            ffn_dim=2 * hidden,
            word_embed_proj_dim=hidden,
            activation_function="gelu" if smooth else "relu",
        ),
        "granite": lambda: t.GraniteConfig(
            **gated,
            embedding_multiplier=12.0,
            residual_multiplier=1.4 / layers**0.5,
            attention_multiplier=width**-0.5,
        ),
    }
    config = makers[family]()
    disable_base_dropout(config)
    return config


def make_encoder(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropout: float = 0.2,
    round_to: torch.dtype | None = None,
    pooling: Any = "eos",
) -> Encoder:
    """A random encoder, the same in every dtype and on every device; nothing of it is zero.

    `round_to`: a dtype that all weights are rounded to first.
    """
    from transformers import AutoModel

    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    base = AutoModel.from_config(config)
    for parameter in base.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
        parameter.data = parameter.data.to(round_to or dtype).to(device, dtype)
    for module in base.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return with_adapter(base, dropout, pooling=pooling, draw=draw, round_to=round_to)


@dataclass(frozen=True)
class Batch:
    """Texts and the rows that point into them."""

    store: TokenStore
    texts: StepTexts

    @property
    def tokens(self) -> int:
        return int(self.store.lengths[self.texts.text_P].sum())


def make_batch(rows: int, num_texts: int, longest: int) -> Batch:
    """Random triplets over few texts, so that some occur several times."""
    draw = np.random.default_rng(3)
    lengths = draw.integers(2, longest + 1, size=num_texts)
    store = TokenStore.from_lists([draw.integers(4, 60, size=n).tolist() for n in lengths])
    anchor_N, positive_N, negative_N = draw.integers(0, num_texts, size=(3, rows))
    table = RowTable(anchor_N, positive_N, negative_N[:, None])
    texts = step_texts(
        table,
        np.arange(rows),
        hard_negatives="batch",
        mask_duplicates=True,
        encode_twins_once=True,
    )
    return Batch(store, texts)


def batch_for(options: Options) -> Batch:
    return make_batch(6, 14, 12) if options.tiny else make_batch(16, 40, 40)


Gradients = dict[str, Tensor]


def greatest_error(got: Gradients, exact: Gradients) -> float:
    """Over the tensors, the greatest difference by the greatest magnitude.

    A tensor below a thousandth of the largest one is measured by that.
    """
    assert got.keys() == exact.keys()
    sizes = {name: float(tensor.abs().max()) for name, tensor in exact.items()}
    floor = max(sizes.values()) / 1000
    assert floor > 0, "all gradients are zero"
    return max(
        float((got[name].double() - tensor.double()).abs().max()) / max(sizes[name], floor)
        for name, tensor in exact.items()
    )


def summed_error(got: Gradients, exact: Gradients) -> float:
    """Sum over the tensors of relative errors in the 2-norm: single elements differ by luck."""
    pairs = [(got[name].double(), tensor.double()) for name, tensor in exact.items()]
    return sum(float((x - y).norm() / y.norm()) for x, y in pairs)


def plans_for(batch: Batch) -> dict[str, StepPlan]:
    """Every dial at its ends and between."""
    tokens = batch.tokens
    few, many = max(1, tokens // 8), max(1, tokens // 3)
    base = StepPlan(backward_tokens=few, forward_tokens=many)
    return {
        "none kept": base,
        "some kept": replace(base, kept_tokens=tokens // 2),
        "all kept": replace(base, kept_tokens=None),
        "checkpointed": replace(base, kept_tokens=tokens // 2, checkpoint_every=1),
        "every second, all kept": replace(base, kept_tokens=None, checkpoint_every=2),
        "offloaded": replace(base, offload_embeddings=True, kept_tokens=tokens // 2),
        "single texts": StepPlan(
            backward_tokens=1,
            forward_tokens=9,
            checkpoint_every=2,
            offload_embeddings=True,
            workspace_bytes=1,
        ),
    }


class FailAt(TorchDispatchMode):
    """Runs out of memory at the k-th operation that makes floating-point numbers, once."""

    def __init__(self, k: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = k

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        in_place = str(func).split(".")[1].endswith("_")  # allocates nothing
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not in_place and any(tensor.is_floating_point() for tensor in made):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory: injected")
        return result
