"""The last layer, computed only where its output is read.

With last-token or first-token pooling one position of each text is read. In the last layer attention needs the
keys and values of all positions, but what follows it works on each position by itself and the
other positions' results go nowhere: there the output projection and the feed-forward network run
on one row of each text. The embedding and all gradients are what they were.

Shape suffixes: B texts, L padded tokens of the chunk, F features in, G features out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lowmem_cft.model.dropout import DropoutClock
from lowmem_cft.model.patches import Patches

_AFTER_ATTENTION = ("o_proj", "out_proj", "dense", "mlp", "fc1", "fc2")
"""Names in transformers' layers of what works on each position by itself. A layer that
names it otherwise is computed whole."""


@dataclass
class ReadRows:
    """Which rows of the chunk in work are read: int64 (B,) in 0..L-1, None for all of them.

    `token_key_B`: the dropout keys of these rows.
    """

    row_B: Tensor | None = None
    token_key_B: Tensor | None = None


def read_only(model: Any, rows: ReadRows, clock: DropoutClock, patches: Patches) -> None:
    """Have the last layer of a base model heed `rows` in training."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        return
    for name, module in lists[0][-1].named_modules():
        path = name.split(".")
        # not inside one that is taken whole
        if path[-1] in _AFTER_ATTENTION and not set(path[:-1]) & set(_AFTER_ATTENTION):
            forward = partial(_forward, module, module.forward, rows, clock)
            patches.install(module, "forward", forward)


def _forward(
    module: nn.Module,
    original: Callable[..., Any],
    rows: ReadRows,
    clock: DropoutClock,
    x: Tensor,
    *others: Any,
    **more: Any,
) -> Any:
    """(..., F) -> (..., G) with zeros in the rows that are not read.

    What experts return besides, the router's scores, is passed on: nobody reads it here. A module
    that takes more than x (BLOOM's add a residual) is computed whole, as is one of a model that pads
    further by itself (Longformer), where rows are others.
    """
    if rows.row_B is None or not module.training or others or more:
        return original(x, *others, **more)
    x_LF = x.reshape(-1, x.shape[-1])
    assert clock.token_key_L is not None
    if len(x_LF) != len(clock.token_key_L):
        return original(x)
    token_key_L, clock.token_key_L = clock.token_key_L, rows.token_key_B
    try:
        out = original(x_LF[rows.row_B][None])
    finally:
        clock.token_key_L = token_key_L
    out_BG = (out[0] if isinstance(out, tuple) else out)[0]
    out_LG = out_BG.new_zeros((x_LF.shape[0], out_BG.shape[1])).index_copy(0, rows.row_B, out_BG)
    out_LG = out_LG.view(*x.shape[:-1], -1)
    return (out_LG, *out[1:]) if isinstance(out, tuple) else out_LG
