"""Which of torch's attention kernels runs, and what its backward holds besides its results.

`torch.nn.functional.scaled_dot_product_attention` chooses among several kernels. cuDNN's, which
recent cards may get, builds a plan for every pair of batch size and length, which takes longer than
many of our chunks; a step cut by length has dozens of such pairs. It is left out here, on every
card.

The backward of the flash kernel sums dQ in float32, in rows padded to a tile of 128 positions. For
texts of a few tokens that is many times what the chunk's own activations take, and no trace on a
CPU shows it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_cft.machine import AMPERE
from lowmem_cft.model.patches import Patches


class Backend(str, Enum):
    """A kernel behind `scaled_dot_product_attention`, or what stands in its place."""

    FLASH = "flash"
    EFFICIENT = "efficient"
    CUDNN = "cudnn"
    MATH = "math"
    """Plain products and a softmax; holds all weights of attention."""
    CPU = "cpu"
    """The flash kernel of CPUs."""
    EAGER = "eager"
    """The model's own code, which does not call `scaled_dot_product_attention`."""


_ALLOWED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_BY_OPERATION = {
    "_scaled_dot_product_flash_attention": Backend.FLASH,
    "_scaled_dot_product_efficient_attention": Backend.EFFICIENT,
    "_scaled_dot_product_cudnn_attention": Backend.CUDNN,
    "_scaled_dot_product_flash_attention_for_cpu": Backend.CPU,
    "_safe_softmax": Backend.MATH,
}

_FLASH_WIDEST_HEAD = 256
TILE = 128
"""Positions to which the backward kernels pad their sums."""


@dataclass(frozen=True)
class AttentionCall:
    """How a layer calls `scaled_dot_product_attention`.

    Args:
        num_heads, num_kv_heads: of queries, and of keys and values.
        head_dim: size of one head.
        masked: an explicit mask is passed, rather than `is_causal`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    masked: bool = False


@contextmanager
def chosen_backends() -> Iterator[None]:
    """Leave cuDNN's attention out, in this process, backward passes included."""
    with sdpa_kernel(_ALLOWED):
        yield


def backend_for(
    call: AttentionCall, dtype: torch.dtype, capability: tuple[int, int] = AMPERE
) -> Backend:
    """The backend that torch takes for a call on a CUDA device, within `chosen_backends`.

    Args:
        dtype: of queries, keys and values.
        capability: the device's; a card since Ampere if not given.
    """
    flash = (
        dtype in (torch.float16, torch.bfloat16)
        and capability >= AMPERE
        and call.head_dim <= _FLASH_WIDEST_HEAD
        and not call.masked
    )
    if flash:
        return Backend.FLASH
    # Keys and values of fewer heads are expanded beforehand where there is a mask; without one
    # the kernel itself has to do it, and the efficient one cannot.
    grouped = call.num_kv_heads != call.num_heads and not call.masked
    return Backend.MATH if grouped else Backend.EFFICIENT


def backward_bytes(
    call: AttentionCall, num_texts: int, width: int, dtype: torch.dtype, backend: Backend
) -> int:
    """Bytes that the backward of one layer's attention holds besides its inputs and results.

    float32 sums of dQ of (texts, width rounded up to 128, heads, head size rounded up to 32, above
    128 to 64), and one number per text, head and padded position: `mha_bwd` in torch 2.11's
    `flash_attn/flash_api.cpp`. The efficient kernel's workspace for 16-bit inputs has tiles of the
    same order (`mem_eff_attention/kernel_backward.h`); it is taken as equal, which no card has
    confirmed.

    Args:
        num_texts, width: texts of a chunk, padded tokens of each.
        dtype: of queries, keys and values.
    """
    if backend not in (Backend.FLASH, Backend.EFFICIENT):
        return 0
    positions = num_texts * call.num_heads * _round_up(width, TILE)
    sums = 1
    if dtype != torch.float32:  # float32 results are their own sums
        sums += _round_up(call.head_dim, 32 if call.head_dim <= 128 else 64)
    return 4 * positions * sums


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class SeenBackends(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes which backends run in forward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: set[Backend] = set()

    @property
    def names(self) -> list[str]:
        """The backends' names, sorted; `eager` alone where none has run."""
        return sorted(backend.value for backend in self._seen) or [Backend.EAGER.value]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        backend = _BY_OPERATION.get(func.overloadpacket.__name__)
        if backend is not None:
            self._seen.add(backend)
        return func(*args, **(kwargs or {}))


class AsOnDevice:
    """While entered, `scaled_dot_product_attention` holds its weights where a GPU would.

    For traces on a CPU, whose own kernel never holds them. The function itself is replaced: a mode
    of torch's is not entered while a backward pass computes checkpointed layers again.

    Args:
        capability: of the CUDA device that is planned for; None for the CPU itself.

    Attributes:
        backends: the distinct calls, with what computes them there.
    """

    def __init__(self, capability: tuple[int, int] | None) -> None:
        self.capability = capability
        self.backends: dict[AttentionCall, Backend] = {}
        self._attend = F.scaled_dot_product_attention

    def __enter__(self) -> AsOnDevice:
        self._attend = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._as_there
        return self

    def __exit__(self, *error: object) -> None:
        F.scaled_dot_product_attention = self._attend

    def _as_there(self, *args: Any, **kwargs: Any) -> Tensor:
        backend = self._note(*args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH) if backend is Backend.MATH else nullcontext():
            return self._attend(*args, **kwargs)

    def _note(
        self, query: Tensor, key: Tensor, _: Tensor, attn_mask: Tensor | None = None, **others: Any
    ) -> Backend:
        masked = attn_mask is not None
        call = AttentionCall(query.shape[1], key.shape[1], query.shape[3], masked)
        backend = Backend.CPU
        if self.capability is not None:
            backend = backend_for(call, query.dtype, self.capability)
        self.backends[call] = backend
        return backend


_thread = threading.local()


def whole_texts() -> AbstractContextManager[None]:
    """Have transformers take every row of a chunk for one text without padding, in this thread.

    Where it is given no mask it looks through the positions for several sequences packed into a
    row, which our chunks never have, and some models make a mask and look through it for padding.
    On a GPU it waits for the device to do so, in every chunk, and on tensors without data it cannot.
    """
    return _texts_are("whole")


def padded_texts() -> AbstractContextManager[None]:
    """Have transformers apply the mask that it is given, padding or none, in this thread.

    It would look for padding first and drop a mask without any: a wait in every chunk, as in
    `whole_texts`, and with some models another arithmetic for chunks that happen to have none.
    """
    return _texts_are("padded")


@contextmanager
def _texts_are(kind: str) -> Iterator[None]:
    if not masking_patches:
        _patch_masking()
    outside = getattr(_thread, "texts", None)
    _thread.texts = kind
    try:
        yield
    finally:
        _thread.texts = outside


masking_patches = Patches()
"""Those in transformers' `masking_utils`: outside `whole_texts` and `padded_texts` they change
nothing, so that they stay from their first use on, for all threads."""


def _patch_masking() -> None:
    """Put the searches for packed sequences and for padding behind a condition of the thread's own."""
    from transformers import masking_utils

    packed = "find_packed_sequence_indices"
    searches = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
    for name in (packed, *searches):
        assert hasattr(masking_utils, name), f"transformers has moved {name}"
    find_packed = getattr(masking_utils, packed)

    @functools.wraps(find_packed)
    def find_unless_told(position_ids: Tensor) -> Any:
        return find_packed(position_ids) if getattr(_thread, "texts", None) is None else None

    masking_patches.install(masking_utils, packed, find_unless_told)
    for name in searches:
        can_ignore = getattr(masking_utils, name)
        masking_patches.install(masking_utils, name, _unless_told(can_ignore))


def _unless_told(can_ignore: Callable[..., bool]) -> Callable[..., bool]:
    """The search for padding, which decides whether a mask is dropped, in threads told nothing."""

    @functools.wraps(can_ignore)
    def ignore(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        texts = getattr(_thread, "texts", None)
        if texts == "padded" and padding_mask is not None:
            return False
        return can_ignore(None if texts == "whole" else padding_mask, *args, **kwargs)

    return ignore
