"""Which tile a kernel takes, as data: by architecture, kernel, dtype and what the block asks for.

`tiles.json` beside this module holds the table; a file named by LOWMEM_CFT_TILES is looked at
first (`python -m lowmem_cft_kernels.tune` writes one for a card). Nothing is tuned at run time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from lowmem_cft_kernels.options import Products
from lowmem_cft_kernels.problem import Block

GROUP = 8
"""Tile rows that go through the columns together, for the cache's sake."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A tile of the matrix, how deep its products are cut, and how it is launched."""

    block_r: int
    block_c: int
    block_d: int
    num_warps: int
    num_stages: int

    def constants(self, width: int, guide_width: int) -> dict[str, Any]:
        """The kernels' compile-time arguments that depend on the tile."""
        return {
            "BLOCK_R": self.block_r,
            "BLOCK_C": self.block_c,
            "BLOCK_D": self.block_d,
            "EVEN_D": width % self.block_d == 0,
            "EVEN_G": guide_width % self.block_d == 0,
            "GROUP": GROUP,
        }

    def options(self) -> dict[str, Any]:
        """The launch's options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"enable_fp_fusion": True}

    def shared_bytes(self, bits: int) -> int:
        """Shared memory that its pipelined operands take, at most."""
        return (self.block_r + self.block_c) * self.block_d * bits // 8 * self.num_stages


LOADS = ("plain", "middle", "heavy")
"""How much a block asks of a tile's registers; no load's tile is larger than the load's before."""


def load_of(block: Block) -> str:
    """The block's entry of `LOADS`: guides are heavy, as they take a second product."""
    keys = 0 if block.row_key_RK is None or block.col_key_CL is None else block.row_key_RK.shape[1]
    if block.related_key_CJ is not None:
        keys += block.related_key_CJ.shape[1]
    positives = 0 if block.target_RP is None else block.target_RP.shape[1]
    if block.guide is not None:
        return "heavy"
    masks = block.row_bound_R is not None or block.hardness is not None
    return "middle" if masks or keys > 2 or positives > 1 else "plain"


def choose_tile(kernel: str, block: Block, products: Products = Products.EXACT) -> Tile:
    """The tile for `lse` or `gradient` on the block's device.

    Cards of one architecture differ in shared memory: where a tile does not fit the card, that of
    the next load is taken. Split embeddings take the tile of 16 bits at half its depth, as two
    halves are loaded at once, and with guides, which are split too, at half its rows.
    """
    if products is Products.EXACT:
        return _tile_that_fits(kernel, block, 8 * block.row_RD.element_size())
    tile = _tile_that_fits(kernel, block, 16)
    rows = tile.block_r if block.guide is None else tile.block_r // 2
    return replace(tile, block_r=rows, block_d=tile.block_d // 2)


def _tile_that_fits(kernel: str, block: Block, bits: int) -> Tile:
    device = block.row_RD.device
    capability = capability_of(device)
    for load in LOADS[LOADS.index(load_of(block)) :]:
        tile = tile_for(capability, kernel, bits, load)
        if device.type != "cuda" or tile.shared_bytes(bits) <= room_bytes(device):
            break
    return tile


def room_bytes(device: torch.device) -> int:
    """Shared memory that a program on a CUDA device may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def capability_of(device: torch.device) -> int:
    """The device's compute capability times ten; 80 for Triton's interpreter on a CPU."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_for(capability: int, kernel: str, bits: int, load: str) -> Tile:
    """The entry of the newest architecture that has one and is not newer than `capability`.

    Raises:
        RuntimeError: the table has none.
    """
    table, name = _table(os.environ.get("LOWMEM_CFT_TILES")), f"{kernel}-{bits}-{load}"
    known = [arch for arch, entries in table.items() if name in entries]
    fitting = [arch for arch in known if arch <= capability]
    if not fitting:
        raise RuntimeError(
            f"no tiles for compute capability {capability}, only from {min(known)} on; "
            "use path=LossPath.CHUNKED"
        )
    return table[max(fitting)][name]


@lru_cache(maxsize=4)
def _table(path: str | None) -> dict[int, dict[str, Tile]]:
    file = resources.files("lowmem_cft_kernels") / "tiles.json"
    table = _read(json.loads(file.read_text(encoding="utf-8")))
    if path is not None:
        for arch, entries in _read(json.loads(Path(path).read_text(encoding="utf-8"))).items():
            table[arch] = table.get(arch, {}) | entries
    return table


def _read(values: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[int, dict[str, Tile]]:
    return {
        int(arch): {name: Tile(**entry) for name, entry in entries.items()}
        for arch, entries in values.items()
    }


def write_table(path: Path, table: Mapping[int, Mapping[str, Tile]]) -> None:
    """Write a table in the form that `LOWMEM_CFT_TILES` is read in."""
    values = {
        str(arch): {name: asdict(tile) for name, tile in entries.items()}
        for arch, entries in table.items()
    }
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
