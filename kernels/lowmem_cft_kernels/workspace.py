"""How much of a loss each path works on at once, from shapes alone, and so what it holds.

The paths cut their work by the functions here, and `workspace_bytes` says by the same ones what a
call will hold. The names of shapes are those of `problem`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowmem_cft_kernels.options import Direction, LossOptions, LossPath, Products

HELD_SHARE = 0.6
"""Share of the workspace that logits may take that are held from the first pass for the second."""

UNITS_SHARE = 0.3
"""Share of the workspace that embeddings may take that are normalised, or widened, once for all."""

TILE_BYTES = 4 * 2**20
"""Bytes of columns that are held in the compute dtype at once, where they come in another."""

RECTANGLE_ROWS = 4096
"""Most rows of a rectangle of the Triton path: enough that adding to the columns' gradient is
little beside computing it."""

COLUMN_PADDING = 16
"""Rows of held tiles are whole multiples of so many numbers long."""

SPLIT_PADDING = 64
"""Both halves of split embeddings are whole multiples of so many numbers long, and so of a tile's
depth."""

STRIP_BYTES = {False: 4 * 2**20, True: 8 * 2**20}
"""Bytes of rows worked on at once where a few numbers per row are wanted, on a CPU and on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The shapes and dtype of a call.

    Attributes:
        num_queries, num_docs, width: M, N and D.
        num_positives: P, most positives of one query.
        dtype: of the embeddings.
        options: of these, guides and bank have shapes of their own.
    """

    num_queries: int
    num_docs: int
    width: int
    num_positives: int
    dtype: torch.dtype
    options: LossOptions

    @property
    def compute(self) -> torch.dtype:
        """The dtype of logits."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def num_banked(self) -> int:
        """C, documents of the bank."""
        return 0 if self.options.bank is None else len(self.options.bank.doc_CD)

    @property
    def guide_width(self) -> int:
        """G, 0 without guides."""
        guides = self.options.false_negatives
        if guides is None or guides.query_guide_MG is None:
            return 0
        return guides.query_guide_MG.shape[1]

    def blocks(self) -> Iterator[tuple[Direction, int, int]]:
        """Direction, rows per query and columns of each block, in the order of `Problem.blocks`."""
        yield Direction.QUERY_TO_DOC, 1, self.num_docs
        if self.num_banked:
            yield Direction.QUERY_TO_DOC, 1, self.num_banked
        if Direction.QUERY_TO_QUERY in self.options.directions:
            yield Direction.QUERY_TO_QUERY, 1, self.num_queries
        if Direction.DOC_TO_DOC in self.options.directions:
            yield Direction.DOC_TO_DOC, self.num_positives, self.num_docs


def workspace_bytes(
    num_queries: int,
    num_docs: int,
    width: int,
    options: LossOptions,
    *,
    dtype: torch.dtype = torch.float32,
    num_positives: int = 1,
) -> int:
    """Most bytes that `info_nce` holds besides inputs, gradients and some numbers per row.

    That is the bound it is given, or what it takes to work on all queries at once where that is
    less, and the halves of split embeddings besides. Up to 16 numbers of 4 bytes per pair of a
    query and a positive, and per document, are not in it. The chunked path is taken to be on a CPU.

    Args:
        num_queries, num_docs, width: M, N and D of the call.
        options: the call's, with the path named. Of tensors the shapes count: they may be on the
            meta device.
        dtype: of the embeddings.
        num_positives: P, most positives of one query.

    Raises:
        ValueError: `options.path` is None or the reference, which has no bound.
    """
    extent = Extent(
        num_queries=num_queries,
        num_docs=num_docs,
        width=width,
        num_positives=num_positives,
        dtype=dtype,
        options=options,
    )
    if options.path is LossPath.CHUNKED:
        at_once, cuda = chunked_bytes_at_once(extent), False
    elif options.path is LossPath.TRITON:
        at_once, cuda = triton_bytes_at_once(extent), True
    else:
        raise ValueError(
            f"options.path: got {options.path}, wanted {LossPath.CHUNKED.value} or "
            f"{LossPath.TRITON.value}, which work in a bounded workspace"
        )
    rows = max(num_queries * num_positives, num_docs if cuda or options.normalize else 0)
    strips = 2 * min(STRIP_BYTES[cuda], rows * width * extent.compute.itemsize)
    halves = 0
    if options.products is Products.SPLIT_BF16 and cuda:
        halves = _halves_bytes(extent)
    return max(min(at_once, options.most_bytes), strips) + halves


# -- the chunked path ------------------------------------------------------------------------------


def bytes_per_query(extent: Extent) -> float:
    """Bytes of one query's logits against all candidates, and of what is made of them."""
    options, numbers = extent.options, 0.0
    for direction, rows_per_query, num_columns in extent.blocks():
        asks = direction is Direction.QUERY_TO_DOC
        copies = 1.5  # logits, and what masks take
        copies += 1.0 if asks else 0.0  # counting
        copies += 1.5 if options.false_negatives is not None else 0.0
        copies += 1.0 if asks and options.hardness is not None else 0.0
        width = extent.width + extent.guide_width
        numbers += rows_per_query * (num_columns * copies + 3 * width)
    return numbers * extent.compute.itemsize


def held_bytes(extent: Extent) -> int:
    """Bytes of logits that a second pass would use again; 0 where there is none."""
    if Direction.DOC_TO_QUERY not in extent.options.directions:
        return 0
    return extent.num_queries * extent.num_docs * extent.compute.itemsize


def unit_bytes(extent: Extent) -> int:
    """Bytes of embeddings normalised, or in the compute dtype; 0 where they come so."""
    if not extent.options.normalize and extent.dtype == extent.compute:
        return 0
    num_rows = extent.num_queries + extent.num_docs + extent.num_banked
    return num_rows * extent.width * extent.compute.itemsize


def chunked_bytes_at_once(extent: Extent) -> int:
    """The workspace in which all queries are worked on at once."""
    logits = round(extent.num_queries * bytes_per_query(extent)) + held_bytes(extent)
    units = unit_bytes(extent)
    if units <= UNITS_SHARE * (logits + units):
        return logits + units
    return logits + min(TILE_BYTES, logits) * (extent.dtype != extent.compute)


# -- the Triton path -------------------------------------------------------------------------------


def gradient_bytes(workspace_bytes: int) -> int:
    """The part of a workspace in which d loss / d similarity is held; the rest are tiles' sums."""
    return workspace_bytes * 3 // 4


def held_dtype(extent: Extent) -> torch.dtype:
    """The dtype in which d loss / d similarity is held."""
    return torch.bfloat16 if extent.options.products is Products.SPLIT_BF16 else extent.dtype


def padded(number: int, padding: int = COLUMN_PADDING) -> int:
    """The next whole multiple of the padding; of rows, one that keeps them aligned to what kernels
    load and store at once."""
    return -(-number // padding) * padding


def triton_bytes_at_once(extent: Extent) -> int:
    """A workspace in which every block is one rectangle, or one strip where there is one pass."""
    blocks, itemsize = list(extent.blocks()), held_dtype(extent).itemsize
    one_pass = len(blocks) == 1 and Direction.DOC_TO_QUERY not in extent.options.directions
    most = 0
    for direction, rows_per_query, num_columns in blocks:
        num_rows = extent.num_queries * rows_per_query
        if not one_pass:
            num_rows = min(num_rows, RECTANGLE_ROWS)
        row_bytes = padded(num_columns) * itemsize
        if direction is Direction.DOC_TO_DOC:  # picked rows and their gradient are held too
            row_bytes += picked_bytes(extent.width, itemsize)
        most = max(most, num_rows * row_bytes)
    return -(-most * 4 // 3)


def picked_bytes(width: int, itemsize: int) -> int:
    """Bytes of a picked row of embeddings and of its gradient."""
    return width * (itemsize + torch.float32.itemsize)


def split_bytes(num_rows: int, width: int) -> int:
    """Bytes that `Products.SPLIT_BF16` holds for `num_rows` float32 embeddings of `width` numbers.

    For a whole call, sum over queries, documents and bank, and over float32 guides, whose width may
    differ. It is as much as the embeddings take where their width is a multiple of 64.
    """
    return num_rows * 2 * padded(width, SPLIT_PADDING) * torch.bfloat16.itemsize


def _halves_bytes(extent: Extent) -> int:
    guides = extent.options.false_negatives
    query_MG = None if guides is None else guides.query_guide_MG
    num_rows = extent.num_queries + extent.num_docs + extent.num_banked
    halves = split_bytes(num_rows, extent.width)
    if query_MG is not None and query_MG.dtype == torch.float32:
        halves += split_bytes(num_rows, extent.guide_width)
    return halves
