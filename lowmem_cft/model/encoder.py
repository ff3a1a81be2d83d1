"""Tokens -> embeddings: positions, masks, the backbone, pooling, normalisation.

The embedding is read at an index computed from the mask, and padding is kept from what is read, so
either padding side and any batch composition give the same vector.

Shape suffixes: B texts, T padded tokens, H hidden size, D embedding size (= H).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_cft.data.chunks import TokenBatch, token_positions
from lowmem_cft.machine import to_device
from lowmem_cft.model.adapter import base_model
from lowmem_cft.model.attention import SeenBackends, chosen_backends, padded_texts, whole_texts
from lowmem_cft.model.causality import needs_mask, without_cache
from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.last_layer import ReadRows, read_only
from lowmem_cft.model.patches import patched_layers
from lowmem_cft.model.prefix import Prefix, ProvenPrefix

Pooling = Literal["last", "eos", "mean", "weighted-mean", "cls"]


def last_rows(mask_BT: Tensor) -> Tensor:
    """int64 (B,): where each text's last real token is among the B * T of the chunk."""
    num_texts, width = mask_BT.shape
    last_B = (mask_BT * torch.arange(width, device=mask_BT.device)).argmax(dim=1)
    return last_B + width * torch.arange(num_texts, device=mask_BT.device)


def first_rows(mask_BT: Tensor) -> Tensor:
    """int64 (B,): where each text's first real token is among the B * T of the chunk."""
    num_texts, width = mask_BT.shape
    return mask_BT.byte().argmax(dim=1) + width * torch.arange(num_texts, device=mask_BT.device)


_ROWS_READ = {"last": last_rows, "eos": last_rows, "cls": first_rows}
"""Poolings that read one token of each text."""


def pool(hidden_BTH: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """One vector per text: (B, H), float32 or wider.

    last, eos: the last real token (with `append_eos` that is the end-of-sequence token).
    cls: the first real token, which an encoder's tokenizer puts there. mean: over real tokens. weighted-mean: weight i + 1 at position i (SGPT, arXiv 2202.08904).
    """
    wide = torch.promote_types(hidden_BTH.dtype, torch.float32)
    if pooling in _ROWS_READ:
        row_B = _ROWS_READ[pooling](mask_BT)
        return hidden_BTH.reshape(-1, hidden_BTH.shape[-1])[row_B].to(wide)
    weight_BT = mask_BT.to(wide)
    if pooling == "weighted-mean":
        weight_BT = weight_BT * (token_positions(mask_BT) + 1)
    weight_BT = weight_BT / weight_BT.sum(dim=1, keepdim=True)
    return torch.einsum("bth,bt->bh", hidden_BTH.to(wide), weight_BT)


class Encoder:
    """Embeds padded chunks with a backbone.

    Args:
        model: a transformers base model (no head), adapter attached; called for its last hidden
            state after the final norm.
        pooling, normalize: how hidden states become one vector.
        clock: the one its dropout modules read.
        masked: whether the backbone is run with a mask in every chunk; tried on it if not given,
            see `causality.needs_mask`.

    Raises:
        ValueError: the pooling reads nothing of a causal backbone's texts, or no mask keeps
            padding from them.
    """

    def __init__(
        self,
        model: Any,
        *,
        pooling: Pooling,
        normalize: bool,
        clock: DropoutClock | None = None,
        masked: bool | None = None,
    ) -> None:
        self.model = model
        self.masked = needs_mask(model) if masked is None else masked
        """Whether tokens see those behind them, so that padding has to be masked."""
        if pooling == "cls" and not self.masked:
            raise ValueError(
                f"embedding.pooling: got cls, but {type(base_model(model)).__name__} is causal: its "
                "first token sees nothing of the text; set it to eos, last or mean"
            )
        self.pooling: Pooling = pooling
        self.normalize = normalize
        self.clock = clock or DropoutClock()
        self.proven_prefix = ProvenPrefix()
        """What `inference.prefix_sharing` need not try again."""
        self.attention: list[str] = []
        """Names of `attention.Backend`: what computed the attention of the first chunk."""
        self._read = ReadRows()
        if self.reads_one:
            read_only(base_model(model), self._read, self.clock, patched_layers(model))

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def reads_one(self) -> bool:
        """Whether the embedding is read at one token of each text alone."""
        return self.pooling in _ROWS_READ

    @property
    def reads_last(self) -> bool:
        """Whether the embedding is read at the last token alone."""
        return _ROWS_READ.get(self.pooling) is last_rows

    def normalizing(self, normalize: bool) -> Encoder:
        """The same encoder, of the same model, whose vectors have length 1 or are as they come."""
        other = copy.copy(self)
        other.normalize = normalize
        return other

    @contextmanager
    def training_mode(self, step: int) -> Iterator[None]:
        """Dropout on, with the masks of this step."""
        self.clock.step = step
        self.model.train()
        try:
            with chosen_backends():  # checkpointed layers run again in the backward
                yield
        finally:
            self.model.eval()

    def __call__(
        self, batch: TokenBatch, place_B: Tensor | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """emb_BD (B, D), float32 or wider.

        Args:
            batch: the chunk, on any device.
            place_B: int64 (B,), the texts' places in the logical batch, for dropout; 0.. if None.
            prefix: what stands before every text of the chunk, which has to be right-padded and
                read at its last tokens; only without gradients.
        """
        batch = batch.to(self.device)
        if self.masked:
            batch = batch.padded_right()  # then positions are the model's own, however it counts
        position_BT = token_positions(batch.mask_BT)
        state = None
        if self.model.training:
            if place_B is None:
                place_B = torch.arange(batch.ids_BT.shape[0])
            state = self._enter(batch, to_device(place_B, self.device), position_BT)
        where, texts_are = self._where(batch, position_BT, prefix)
        with texts_are:
            hidden_BTH = self._hidden(batch.ids_BT, **where)
        emb_BD = pool(hidden_BTH, batch.mask_BT, self.pooling)
        emb_BD = F.normalize(emb_BD, dim=-1) if self.normalize else emb_BD
        if state is not None and emb_BD.requires_grad:
            # Checkpointed layers run again in the backward, maybe after other chunks.
            emb_BD.register_hook(lambda _: self._resume(*state))  # type: ignore[no-untyped-call]
        return emb_BD

    def _where(
        self, batch: TokenBatch, position_BT: Tensor, prefix: Prefix | None
    ) -> tuple[dict[str, Any], AbstractContextManager[None]]:
        """What the model is told of masks and positions, and what transformers takes texts for."""
        if prefix is not None:
            assert batch.right_padded
            assert self.reads_last
            assert not self.masked
            assert not torch.is_grad_enabled()
            # Positions go on behind what the cache holds, as in generation.
            return {"use_cache": True, "past_key_values": prefix.cache}, whole_texts()
        where: dict[str, Any] = dict(without_cache(self.model))
        if self.masked:
            return where | {"attention_mask": batch.mask_BT.long()}, padded_texts()
        if batch.right_padded:
            # A causal model's real tokens never see what is padded behind them, and the padding
            # gets no gradient: without a mask attention takes its fastest way and copies nothing.
            return where, whole_texts()
        masks = {"attention_mask": batch.mask_BT.long(), "position_ids": position_BT}
        return where | masks, nullcontext()

    def _hidden(self, ids_BT: Tensor, **where: Any) -> Tensor:
        implementation = base_model(self.model).config._attn_implementation
        if implementation not in ("sdpa", "eager", None):
            self.attention = [implementation]  # its operations are no kernels of torch's
        seen = nullcontext() if self.attention else SeenBackends()
        with chosen_backends(), seen:
            hidden_BTH: Tensor = self.model(input_ids=ids_BT, **where).last_hidden_state
        if isinstance(seen, SeenBackends):
            self.attention = seen.names
        return hidden_BTH

    def _enter(
        self, batch: TokenBatch, place_B: Tensor, position_BT: Tensor
    ) -> tuple[Tensor, ReadRows]:
        """Set what layers ask about the chunk, and return what `_resume` needs to set it again."""
        self.clock.set_chunk(place_B, position_BT)
        token_key_L = self.clock.token_key_L
        assert token_key_L is not None
        read = ReadRows()
        if self.reads_one:
            row_B = _ROWS_READ[self.pooling](batch.mask_BT)
            read = ReadRows(row_B, token_key_L[row_B])
        self._resume(token_key_L, read)
        return token_key_L, read

    def _resume(self, token_key_L: Tensor, read: ReadRows) -> None:
        self.clock.token_key_L = token_key_L
        self._read.row_B, self._read.token_key_B = read.row_B, read.token_key_B
