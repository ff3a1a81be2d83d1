"""Going on when memory runs out: give the work back, cut it smaller, do it again."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lowmem_cft.data.chunks import Chunk, Cut


class DoesNotFit(RuntimeError):
    """Memory ran out with the smallest piece of work there is."""


_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's CPU allocator
    "out of memory",  # CUDA's own calls, as in bitsandbytes
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OUT_OF_MEMORY)


def try_in_memory(work: Callable[[], object]) -> bool:
    """Do the work; False if memory ran out, with all that it held given back."""
    try:
        work()
        return True
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, DoesNotFit) or not is_out_of_memory(error):
            raise
    # Only here, outside the handler, are the frames gone whose tensors the exception held.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def work_off(
    place_P: Tensor, budget: int, cut: Cut, work: Callable[[Chunk], None], doing: str
) -> int:
    """Do the work on every text, in chunks of the budget; halve it where one runs out of memory.

    Args:
        doing: what the work is, for the message.

    Returns:
        The budget that all of it fitted in.

    Raises:
        DoesNotFit: memory ran out with a single text.
    """
    waiting = list(cut(place_P, budget)) if len(place_P) else []
    while waiting:
        chunk = waiting[0]
        if try_in_memory(partial(work, chunk)):
            waiting.pop(0)
            continue
        if len(chunk.place_B) == 1:
            raise DoesNotFit(
                f"memory ran out in {doing} a single text of {chunk.tokens} tokens; lower "
                "text.max_tokens, set memory.checkpointing: on, or use model.quantization: nf4"
            )
        budget = max(1, chunk.tokens // 2)
        waiting = list(cut(torch.cat([chunk.place_B for chunk in waiting]), budget))
    return budget
