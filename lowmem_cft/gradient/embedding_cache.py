"""The embeddings of a step and their gradient: all that grows with the logical batch.

The loss sees S slots, queries first, then documents. The pool has P texts, each encoded once; a
text that occurs several times in the step has several slots. Rows stand in slot order, so that the
loss works on views and nothing else of size S x D is ever made.

Shape suffixes: S slots, P texts of the pool, B texts of a chunk, K slots of some texts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowmem_cft import machine
from lowmem_cft.machine import to_device

DTYPES = {**machine.DTYPES, "split-bf16": torch.float32}


class Slots:
    """Which slots each text of the pool has.

    Args:
        place_S: int64 (S,) on the CPU, the place in the pool of each slot's text; every place
            occurs at least once.
    """

    def __init__(self, place_S: Tensor) -> None:
        self.num_slots = len(place_S)
        count_P = torch.bincount(place_S)
        assert bool((count_P > 0).all()), "a text of the pool has no slot"
        self.num_texts = len(count_P)
        self._order_S = torch.argsort(place_S, stable=True)
        self._count_P = count_P
        self._start_P = count_P.cumsum(0) - count_P

    def levels(
        self, place_B: Tensor, device: torch.device
    ) -> Iterator[tuple[Tensor | None, Tensor]]:
        """(rows of the chunk, their first slot), then (rows, second slot) of those with two, ...

        Both on `device`; rows are None where they are all of them, as they are at first. No row
        occurs twice in a level, so sums over levels have one order: they are the same in every run,
        also on a GPU.
        """
        start_B, count_B = self._start_P[place_B], self._count_P[place_B]
        yield None, to_device(self._order_S[start_B], device)
        for level in range(1, int(count_B.max())):
            (row_K,) = torch.nonzero(count_B > level, as_tuple=True)
            slot_K = self._order_S[start_B[row_K] + level]
            yield to_device(row_K, device), to_device(slot_K, device)


class EmbeddingCache:
    """emb_SD (S, D) and its gradient d_emb_SD, on the model's device or in host memory.

    Args:
        slots: of the step.
        dtype: `StepPlan.embedding_dtype`.
        offload: keep both in host memory (pinned where there is a GPU) but during `on_device`.
    """

    def __init__(self, slots: Slots, dtype: str, *, offload: bool) -> None:
        self._slots, self._dtype, self._offload = slots, dtype, offload
        self.emb_SD: Tensor | None = None
        self.d_emb_SD: Tensor | None = None
        self._device = torch.device("cpu")

    def _allocate(self, like_BD: Tensor) -> Tensor:
        wide = like_BD.dtype == torch.float64 and DTYPES[self._dtype] == torch.float32
        host = self._offload and like_BD.device.type != "cpu"
        self._device = like_BD.device
        return torch.empty(
            (self._slots.num_slots, like_BD.shape[1]),
            dtype=torch.float64 if wide else DTYPES[self._dtype],
            device="cpu" if host else like_BD.device,
            pin_memory=host,
        )

    def write(self, place_B: Tensor, emb_BD: Tensor) -> None:
        """Store the embeddings (B, D) of the texts at these places."""
        emb_BD = emb_BD.detach()
        if self.emb_SD is None:
            self.emb_SD = self._allocate(emb_BD)
        emb_SD = self.emb_SD
        emb_BD = emb_BD.to(device=emb_SD.device, dtype=emb_SD.dtype)
        for row_K, slot_K in self._slots.levels(place_B, emb_SD.device):
            emb_SD[slot_K] = emb_BD if row_K is None else emb_BD[row_K]

    def for_loss(self) -> tuple[Tensor, Tensor]:
        """emb_SD and an uninitialised d_emb_SD of its shape, float32 or wider, on the device."""
        assert self.emb_SD is not None, "a step without texts"
        emb_SD = self.emb_SD.to(self._device)
        wide = torch.promote_types(emb_SD.dtype, torch.float32)
        return emb_SD, torch.empty_like(emb_SD, dtype=wide)

    def keep_gradient(self, d_emb_SD: Tensor) -> None:
        """Take the gradient; the embeddings themselves are needed no more."""
        assert self.emb_SD is not None
        if self.emb_SD.device == d_emb_SD.device:
            self.d_emb_SD = d_emb_SD
        else:
            host_SD = torch.empty_like(d_emb_SD, device=self.emb_SD.device, pin_memory=True)
            self.d_emb_SD = host_SD.copy_(d_emb_SD)
        self.emb_SD = None

    def gradient(self, place_B: Tensor) -> Tensor:
        """d loss / d embedding (B, D) of the texts at these places, on the device."""
        d_emb_SD = self.d_emb_SD
        assert d_emb_SD is not None, "the loss has not been computed"
        levels = self._slots.levels(place_B, d_emb_SD.device)
        _, slot_B = next(levels)
        d_emb_BD = d_emb_SD[slot_B]
        for row_K, slot_K in levels:
            d_emb_BD[row_K] += d_emb_SD[slot_K]
        return to_device(d_emb_BD, self._device)
