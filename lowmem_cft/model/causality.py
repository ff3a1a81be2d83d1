"""Whether a backbone's tokens see what stands behind them, padding included.

A causal model's do not, so its right-padded chunks run without a mask. Encoders, and decoders whose
configuration makes them bidirectional (`is_causal`, `use_bidirectional_attention`), need one in
every chunk. Which a model is, is tried on a few tokens; without weights, its configuration says it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lowmem_cft.machine import dtype_name
from lowmem_cft.model.adapter import base_model
from lowmem_cft.model.attention import chosen_backends, padded_texts, whole_texts

_TEXT, _PADDING = 4, 4
"""Tokens of the text and of the padding that a model is tried on."""

# Largest differences that are rounding, as shares of the largest number of the hidden states. The
# first two texts go through the same kernels; with a mask they may be other ones, of other rounding.
_SAME = {torch.float32: 1e-4, torch.float64: 1e-4}
_SAME_16_BIT, _SAME_MASKED_16_BIT = 5e-3, 0.1


def declared_bidirectional(model: Any) -> bool:
    """Whether the configuration and the layers of a model say that tokens see those behind them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    base = base_model(model)
    if getattr(base.config, "is_causal", None) is False:
        return True
    if any(getattr(module, "is_causal", None) is False for module in base.modules()):
        return True
    encodes = base.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return encodes and not getattr(base.config, "is_decoder", False)


@torch.no_grad()
def needs_mask(model: Any) -> bool:
    """Whether tokens see those behind them, by trying it; the model is left in evaluation mode.

    Raises:
        ValueError: they do, and a mask does not keep padding from them; or numbers are not finite.
    """
    model.eval()
    numbers = base_model(model).config.get_text_config().vocab_size
    first, then, otherwise = (numbers // divisor for divisor in (2, 3, 5))
    device = next(model.parameters()).device

    def run(*tokens: int, mask_1T: Tensor | None = None) -> Tensor:
        ids_1T = torch.tensor([tokens], device=device)
        masked = {} if mask_1T is None else {"attention_mask": mask_1T}
        with chosen_backends(), whole_texts() if mask_1T is None else padded_texts():
            hidden_1TH: Tensor = model(
                input_ids=ids_1T, **without_cache(model), **masked
            ).last_hidden_state
        return hidden_1TH[0, :_TEXT].double()

    text = (first, *[then] * (_TEXT - 1))
    alone_TH = run(*text)
    if not alone_TH.isfinite().all():
        dtype = dtype_name(model.dtype)
        raise ValueError(
            f"model.dtype: what {type(base_model(model)).__name__} computes is not finite in {dtype}; "
            "take a wider one, such as model.dtype: fp32, or get its weights again"
        )
    apart = _apart(alone_TH[:1], run(first, *[otherwise] * (_TEXT - 1))[:1])
    if apart <= _SAME.get(model.dtype, _SAME_16_BIT):
        return False
    mask_1T = torch.tensor([[1] * _TEXT + [0] * _PADDING], device=device)
    apart = _apart(alone_TH, run(*text, *[otherwise] * _PADDING, mask_1T=mask_1T))
    if not apart <= _SAME.get(model.dtype, _SAME_MASKED_16_BIT):
        raise ValueError(
            f"model.id: {type(base_model(model)).__name__} lets padding into its texts in spite of "
            f"the mask ({apart:.0%} apart), so that a text's embedding would depend on those beside "
            "it; name a model whose attention heeds its mask, such as BERT, XLM-R or ModernBERT"
        )
    return True


def without_cache(model: Any) -> dict[str, bool]:
    """The argument by which a model's `forward` keeps no keys and values, where it knows one."""
    parameters = inspect.signature(type(base_model(model)).forward).parameters
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if takes_more or "use_cache" in parameters else {}


def _apart(one_TH: Tensor, other_TH: Tensor) -> float:
    return float((one_TH - other_TH).abs().max() / one_TH.abs().max())
