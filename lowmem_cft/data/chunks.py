"""A padded chunk of token ids: what the token stage hands to the encoder.

Shape suffixes: B texts of the chunk, T padded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_cft.machine import to_device


@dataclass(frozen=True)
class TokenBatch:
    """`ids_BT` int64 and `mask_BT` bool (True at real tokens), both (B, T).

    `right_padded` promises that every row's real tokens come first.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    right_padded: bool = False

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            to_device(self.ids_BT, device), to_device(self.mask_BT, device), self.right_padded
        )


def token_positions(mask_BT: Tensor) -> Tensor:
    """int64 (B, T): 0 at each text's first real token, whatever the padding side."""
    return (mask_BT.long().cumsum(dim=1) - 1).clamp_(min=0)
