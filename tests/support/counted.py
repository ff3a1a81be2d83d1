"""An encoder that counts what it is given."""

from __future__ import annotations

from typing import Any

from lowmem_cft.model.encoder import Encoder


class Counted(Encoder):
    """Counts the texts and tokens it is given."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.texts = self.tokens = 0

    def __call__(self, batch: Any, place_B: Any = None, prefix: Any = None) -> Any:
        self.texts += len(batch.ids_BT)
        self.tokens += int(batch.mask_BT.sum())
        return super().__call__(batch, place_B, prefix)
