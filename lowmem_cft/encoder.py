"""Tokens -> embeddings: positions, the backbone, pooling, normalisation.

Positions are explicit and the embedding is read at an index computed from the mask, so either
padding side and any batch composition give the same vector.

Shape suffixes: B texts, T padded tokens, H hidden size, D embedding size (= H).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_cft.batch import TokenBatch, token_positions
from lowmem_cft.dropout import DropoutClock

Pooling = Literal["last", "eos", "mean", "weighted-mean"]


def pool(hidden_BTH: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """(B, H) in float32 or wider.

    last, eos: the last real token (with `append_eos` that is the end-of-sequence token).
    mean: over real tokens. weighted-mean: weight i + 1 at position i (SGPT, arXiv 2202.08904).
    """
    wide = torch.promote_types(hidden_BTH.dtype, torch.float32)
    if pooling in ("last", "eos"):
        index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        last_B = (mask_BT * index_T).argmax(dim=1)
        rows_B = torch.arange(mask_BT.shape[0], device=mask_BT.device)
        return hidden_BTH[rows_B, last_B].to(wide)
    weight_BT = mask_BT.to(wide)
    if pooling == "weighted-mean":
        weight_BT = weight_BT * (token_positions(mask_BT) + 1)
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True)
    return torch.einsum("bth,bt->bh", hidden_BTH.to(wide), weight_BT)


class Encoder:
    """Embeds padded chunks with a causal backbone.

    Args:
        model: a transformers base model (no head), adapter attached; called for its last hidden
            state after the final norm.
        pooling, normalize: how hidden states become one vector.
        clock: the one its dropout modules read.
    """

    def __init__(
        self,
        model: Any,
        *,
        pooling: Pooling,
        normalize: bool,
        clock: DropoutClock | None = None,
    ) -> None:
        self.model = model
        self.pooling: Pooling = pooling
        self.normalize = normalize
        self.clock = clock or DropoutClock()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @contextmanager
    def training_mode(self, step: int) -> Iterator[None]:
        """Dropout on, with the masks of this step."""
        self.clock.step = step
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def __call__(self, batch: TokenBatch, place_B: Tensor | None = None) -> Tensor:
        """emb_BD (B, D), float32 or wider.

        Args:
            batch: the chunk, on any device.
            place_B: int64 (B,), the texts' places in the logical batch, for dropout; 0.. if None.
        """
        batch = batch.to(self.device)
        position_BT = token_positions(batch.mask_BT)
        keys_L = None
        if self.model.training:
            if place_B is None:
                place_B = torch.arange(batch.ids_BT.shape[0])
            self.clock.set_chunk(place_B.to(self.device), position_BT)
            keys_L = self.clock.token_key_L
        if batch.right_padded:
            # A causal model's real tokens never see what is padded behind them, and the padding
            # gets no gradient: without a mask attention takes its fastest way and copies nothing.
            where: dict[str, Tensor] = {}
        else:
            where = {"attention_mask": batch.mask_BT.long(), "position_ids": position_BT}
        hidden_BTH = self.model(input_ids=batch.ids_BT, use_cache=False, **where).last_hidden_state
        emb_BD = pool(hidden_BTH, batch.mask_BT, self.pooling)
        emb_BD = F.normalize(emb_BD, dim=-1) if self.normalize else emb_BD
        if keys_L is not None and emb_BD.requires_grad:
            # Checkpointed layers run again in the backward, maybe after other chunks.
            emb_BD.register_hook(lambda _: self._resume(keys_L))  # type: ignore[no-untyped-call]
        return emb_BD

    def _resume(self, token_key_L: Tensor) -> None:
        self.clock.token_key_L = token_key_L
