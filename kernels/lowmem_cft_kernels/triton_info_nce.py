"""InfoNCE value and gradient by Triton tile kernels and library matrix products.

A first pass computes every tile's log-sum-exps in registers and merges them; a second one computes
the tiles again, writes d loss / d similarity of a rectangle of them (in the inputs' dtype) into the
workspace, and two matrix products turn it into gradients. No logit is ever rounded or stored; what
is rounded to 16 bit are probabilities. `kernels/README.md` has the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from lowmem_cft_kernels.denominators import column_shift, join, mean_loss, row_shift
from lowmem_cft_kernels.options import Direction, Negatives, Products
from lowmem_cft_kernels.problem import Block, Problem, add_at, row_blocks, strips, through_norm
from lowmem_cft_kernels.split import split
from lowmem_cft_kernels.tally import Tally
from lowmem_cft_kernels.tiles import Tile, choose_tile
from lowmem_cft_kernels.triton_tiles import (
    gradient_kernel,
    lse_kernel,
    merge_kernel,
    scale_kernel,
)
from lowmem_cft_kernels.workspace import (
    RECTANGLE_ROWS,
    gradient_bytes,
    held_dtype,
    padded,
    picked_bytes,
)

LN2 = math.log(2.0)

HARDNESS_ON = {Negatives.HARD: 1, Negatives.IN_BATCH: 2, Negatives.ALL: 3}

_FEWEST_ROWS = 512
"""Rows at once below which adding to the columns' gradient costs more than a second pass."""

_SCALE_NUMBERS = 4096
"""Numbers that one program scales."""

_SCALE_TAKES = ("target_ptr", "positive_ptr", "row_inverse_ptr", "col_inverse_ptr", "P")

_MERGE_PARTS, _MERGE_ROWS = 32, 32
"""Tiles that one program merges at a time, of so many rows."""

_PLAIN_LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
"""Options of kernels without products; fusion is named because triton warns where it is not."""

_LSE_ROW_BYTES = 5 * 4
"""Bytes that the first pass writes per row and tile of columns."""

_FP16_RANGE = 2.0**13
"""Greatest d loss / d similarity after scaling, where it is held in float16."""


def interpreted() -> bool:
    """Kernels run in triton's interpreter, on a CPU (set by TRITON_INTERPRET=1 before import)."""
    return bool(triton.knobs.runtime.interpret)


class _Sums:
    """Maxima and shifted sums of exponentials, in units of log2, of all rows or columns of a block.

    Attributes:
        top, total: (count,), over the tiles that are merged.
        part_top, part_total: room for those of a rectangle's tiles.
    """

    def __init__(self, like: Tensor, count: int, part_size: int) -> None:
        self.top, self.total = like.new_full((count,), -torch.inf), like.new_zeros(count)
        # tensors of their own: kernels are compiled anew for a slice that begins off 16 bytes
        self.part_top, self.part_total = (like.new_empty(part_size) for _ in range(2))

    def lse(self) -> Tensor:
        """(count,), natural."""
        return self.total.log().add_(self.top, alpha=LN2)


class Fused:
    """The loss of one problem, its gradients written to `d_query_MD` and `d_doc_ND`."""

    def __init__(self, problem: Problem, d_query_MD: Tensor, d_doc_ND: Tensor) -> None:
        self.problem, self.products = problem, problem.options.products
        self.held_dtype = held_dtype(problem.extent)
        self.d_query_MD, self.d_doc_ND = d_query_MD, d_doc_ND
        self.gradient_bytes = gradient_bytes(problem.options.most_bytes)
        self.lse_bytes = problem.options.most_bytes - self.gradient_bytes
        self.tally = Tally.empty(problem)
        self.temperature = problem.temperature.reshape(1)
        # what brings similarities to logits in units of log2: rounded once, as no division is there
        self.unit = (1 / (self.temperature.double() * LN2)).float()
        self.best_M = problem.best_M
        self._arguments: dict[int, dict[str, Any]] = {}
        self._split: dict[int, Tensor] = {}

    def run(self) -> tuple[Tensor, Tensor]:
        """Loss and d loss / d temperature."""
        problem = self.problem
        self.d_query_MD.zero_()
        self.d_doc_ND.zero_()
        self.fp16_scale = self._fp16_scale()
        self.scale = (self.fp16_scale / self.temperature).contiguous()
        if self._rows_at_once():
            loss, product = self._one_pass()
        else:
            lse_MP = self._log_sum_exps()
            everyone = slice(0, len(problem.target_MP))
            loss = mean_loss(problem, everyone, lse_MP)
            product = self._gradients(everyone, lse_MP)
        if problem.queries_with_documents.row_RD.dtype == torch.float16:
            self.d_query_MD /= self.fp16_scale
            self.d_doc_ND /= self.fp16_scale
            product = product / self.fp16_scale
        block = problem.queries_with_documents
        if block.row_inverse_R is not None and block.col_inverse_C is not None:
            through_norm(block.row_RD, block.row_inverse_R, self.d_query_MD)
            through_norm(block.col_CD, block.col_inverse_C, self.d_doc_ND)
        return loss, (-product / self.temperature)[0]

    # -- one pass, where only queries choose, and only among documents ----------------------------

    def _rows_at_once(self) -> int:
        """Rows whose exponentials against all documents fit; 0 where two passes are better."""
        block = self.problem.queries_with_documents
        if self.problem.documents_choose or len(self.problem.blocks) > 1:
            return 0
        num_rows, num_columns = _size(block)
        rows = self.gradient_bytes // (padded(num_columns) * self.held_dtype.itemsize)
        tile = self._tile("lse", block)
        tiles = triton.cdiv(num_columns, tile.block_c)
        rows = min(rows, self.lse_bytes // (tiles * _LSE_ROW_BYTES * 2), num_rows)
        if tile.block_r < rows < num_rows:  # no tile but the matrix's last is partly empty
            rows -= rows % tile.block_r
        return rows if rows >= min(num_rows, _FEWEST_ROWS) else 0

    def _one_pass(self) -> tuple[Tensor, Tensor]:
        """Loss, and the sum of G z; G from a strip's exponentials, scaled in place."""
        problem, block = self.problem, self.problem.queries_with_documents
        num_rows, num_columns = _size(block)
        tile, size_r = self._tile("lse", block), self._rows_at_once()
        self._shared(block)  # makes halves, which takes workspace too
        held = self.best_M.new_empty((size_r, padded(num_columns)), dtype=self.held_dtype)
        columns, tiles = slice(0, num_columns), triton.cdiv(num_columns, tile.block_c)
        sums_R, counts = _Sums(self.best_M, num_rows, tiles * size_r), self._counts(tiles * size_r)
        for rows in row_blocks(num_rows, size_r):
            strip = held[: rows.stop - rows.start]
            self._sum_tiles(block, rows, columns, tile, sums_R, counts=counts, exp=strip)
            self._to_gradient(block, rows, tile, strip, sums_R)
            self._multiply(block, rows, columns, strip[:, :num_columns])
        loss = mean_loss(problem, slice(0, num_rows), [join(problem, None, sums_R.lse()[:, None])])
        del held, strip, sums_R, counts  # what comes takes workspace too
        return loss, self._with_own_gradient()

    def _to_gradient(
        self, block: Block, rows: slice, tile: Tile, held: Tensor, sums_R: _Sums
    ) -> None:
        num_rows, num_columns = rows.stop - rows.start, _size(block)[1]
        part_rows = max(1, _SCALE_NUMBERS // tile.block_c)
        grid = (triton.cdiv(num_rows, part_rows) * triton.cdiv(num_columns, tile.block_c),)
        shared = self._shared(block)
        with torch.cuda.device_of(held):  # type: ignore[no-untyped-call]
            scale_kernel[grid](
                held_ptr=held,
                part_top_ptr=sums_R.part_top,
                top_ptr=sums_R.top,
                total_ptr=sums_R.total,
                weight_ptr=self.problem.weight_MP,
                unit_ptr=self.unit,
                scale_ptr=self.scale,
                first_row=rows.start,
                num_rows=num_rows,
                num_columns=num_columns,
                held_stride=held.stride(0),
                BLOCK_C=tile.block_c,
                PART_R=part_rows,
                **_PLAIN_LAUNCH,
                **{name: shared[name] for name in _SCALE_TAKES},
            )

    # -- first pass -----------------------------------------------------------------------------

    def _log_sum_exps(self) -> list[Tensor]:
        """(M, P) for each softmax."""
        problem = self.problem
        lse_MP: list[Tensor | None] = [None] * len(problem.options.softmaxes)
        for block in problem.blocks:
            softmax = problem.softmax_of(block.direction)
            lse_R, lse_C = self._scan(block, rows_choose=softmax is not None)
            choosing = problem.softmax_of(Direction.DOC_TO_QUERY)
            if softmax is not None and lse_R is not None:
                lse_MP[softmax] = join(problem, lse_MP[softmax], lse_R[:, None])
            if lse_C is not None and choosing is not None:
                column_MP, rows_lse_MP = lse_C[problem.target_MP], lse_MP[choosing]
                lse_MP[choosing] = (
                    column_MP if rows_lse_MP is None else torch.logaddexp(rows_lse_MP, column_MP)
                )
        return [softmax_MP for softmax_MP in lse_MP if softmax_MP is not None]

    def _scan(self, block: Block, *, rows_choose: bool) -> tuple[Tensor | None, Tensor | None]:
        """Log-sum-exps of a block's rows and of its columns, as far as they choose."""
        problem = self.problem
        tile = self._tile("lse", block)
        columns_choose = block is problem.queries_with_documents and problem.documents_choose
        num_rows, num_columns = _size(block)
        size_r = min(RECTANGLE_ROWS, num_rows)
        per_tile = max(1, self.lse_bytes // (size_r * _LSE_ROW_BYTES * 2))
        size_c = min(per_tile * tile.block_c, num_columns)
        parts_r, parts_c = triton.cdiv(size_r, tile.block_r), triton.cdiv(size_c, tile.block_c)
        sums_R = sums_C = counts = None
        if rows_choose:
            sums_R = _Sums(self.best_M, num_rows, parts_c * size_r)
        if columns_choose:
            sums_C = _Sums(self.best_M, num_columns, parts_r * size_c)
        if block.direction is Direction.QUERY_TO_DOC:
            counts = self._counts(parts_c * size_r)
        for rows, columns in _rectangles(num_rows, num_columns, size_r, size_c):
            self._sum_tiles(block, rows, columns, tile, sums_R, sums_C, counts)
        lse_R = None if sums_R is None else sums_R.lse()
        return lse_R, None if sums_C is None else sums_C.lse()

    def _counts(self, size: int) -> list[Tensor]:
        """Room for what the tally takes of a rectangle's tiles: visible above, visible, their sum."""
        integers = [self.best_M.new_empty(size, dtype=torch.int32) for _ in range(2)]
        return [*integers, self.best_M.new_empty(size)]

    def _sum_tiles(
        self,
        block: Block,
        rows: slice,
        columns: slice,
        tile: Tile,
        sums_R: _Sums | None,
        sums_C: _Sums | None = None,
        counts: list[Tensor] | None = None,
        exp: Tensor | None = None,
    ) -> None:
        """Add a rectangle to the sums that are given, and its counts to the tally."""
        above, seen, total = (None, None, None) if counts is None else counts
        outputs = {
            "row_top_ptr": None if sums_R is None else sums_R.part_top,
            "row_total_ptr": None if sums_R is None else sums_R.part_total,
            "col_top_ptr": None if sums_C is None else sums_C.part_top,
            "col_total_ptr": None if sums_C is None else sums_C.part_total,
            "above_ptr": above,
            "seen_ptr": seen,
            "sum_ptr": total,
            "best_ptr": None if counts is None else self.best_M,
            "exp_ptr": exp,
            "exp_stride": 0 if exp is None else exp.stride(0),
        }
        self._launch(lse_kernel, block, rows, columns, tile, outputs)
        num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
        if sums_R is not None or counts is not None:
            self._merge(sums_R, counts, triton.cdiv(num_columns, tile.block_c), rows)
        if sums_C is not None:
            self._merge(sums_C, None, triton.cdiv(num_rows, tile.block_r), columns)

    def _merge(
        self, sums: _Sums | None, counts: list[Tensor] | None, num_parts: int, at: slice
    ) -> None:
        above, seen, total = (None, None, None) if counts is None else counts
        tally = None if counts is None else self.tally
        count = at.stop - at.start
        with torch.cuda.device_of(self.best_M):  # type: ignore[no-untyped-call]
            merge_kernel[(triton.cdiv(count, _MERGE_ROWS),)](
                part_top_ptr=None if sums is None else sums.part_top,
                part_total_ptr=None if sums is None else sums.part_total,
                part_above_ptr=above,
                part_seen_ptr=seen,
                part_sum_ptr=total,
                top_ptr=None if sums is None else sums.top,
                total_ptr=None if sums is None else sums.total,
                above_ptr=None if tally is None else tally.above_M,
                seen_ptr=None if tally is None else tally.seen_M,
                sum_ptr=None if tally is None else tally.sum_M,
                num_parts=_loop_bound(num_parts),
                first=at.start,
                count=count,
                PARTS=_MERGE_PARTS,
                BLOCK=_MERGE_ROWS,
                **_PLAIN_LAUNCH,
            )

    # -- second pass ----------------------------------------------------------------------------

    def _gradients(self, everyone: slice, lse_MP: list[Tensor]) -> Tensor:
        """Fill both gradients, as `_one_pass`; the sum of G z."""
        problem, choosing = self.problem, self.problem.softmax_of(Direction.DOC_TO_QUERY)
        col_shift_N = None if choosing is None else column_shift(problem, lse_MP[choosing]) / LN2
        learning = [block for block in problem.blocks if block.learns]
        for block in learning:
            self._push_all(block, everyone, lse_MP, col_shift_N)
        # each block's sum of G z is <rows, their gradient>, and <columns, theirs> once more
        product = (self._with_own_gradient() + self._with_own_gradient(docs=True)) / 2
        if len(learning) == len(problem.blocks):
            return product
        learned = self._with_own_gradient()
        for block in problem.blocks:
            if not block.learns:
                self._push_all(block, everyone, lse_MP, col_shift_N)
        return product + self._with_own_gradient() - learned

    def _fp16_scale(self) -> Tensor:
        """(1,): what brings d loss / d similarity into float16's range; 1 for other dtypes."""
        block = self.problem.queries_with_documents
        if block.row_RD.dtype != torch.float16:
            return torch.ones_like(self.temperature)
        greatest = self.problem.weight_MP.max()
        greatest = torch.where(greatest > 0, greatest, 1.0) / self.temperature
        if block.row_inverse_R is not None and block.col_inverse_C is not None:
            greatest = greatest * block.row_inverse_R.max() * block.col_inverse_C.max()
        return _FP16_RANGE / greatest

    def _push_all(
        self,
        block: Block,
        everyone: slice,
        lse_MP: list[Tensor],
        col_shift_N: Tensor | None,
    ) -> None:
        """Add a block's gradients, rectangle by rectangle."""
        problem, tile = self.problem, self._tile("gradient", block)
        softmax = problem.softmax_of(block.direction)
        row_shift_R = None
        if softmax is not None:
            row_shift_R = row_shift(problem, block, everyone, lse_MP[softmax])[:, 0] / LN2
        positives = block is problem.queries_with_documents
        num_rows, num_columns = _size(block)
        itemsize, width = self.held_dtype.itemsize, block.row_RD.shape[1]
        size_r, row_bytes = min(RECTANGLE_ROWS, num_rows), 0
        if block.pick_R is not None:  # picked rows and their gradient are held too
            row_bytes = picked_bytes(width, itemsize)
            size_r = min(size_r, max(1, self.gradient_bytes // (2 * row_bytes)))
        size_c = (self.gradient_bytes // size_r - row_bytes) // itemsize // 128 * 128
        size_c = min(max(128, size_c), padded(num_columns))
        held = self.best_M.new_empty((size_r, size_c), dtype=self.held_dtype)
        for rows, columns in _rectangles(num_rows, num_columns, size_r, size_c):
            wide = columns.stop - columns.start
            rectangle = held[: rows.stop - rows.start, : padded(wide)]
            outputs = {
                "weight_ptr": problem.weight_MP if positives else None,
                "scale_ptr": self.scale,
                "row_shift_ptr": row_shift_R,
                "col_shift_ptr": col_shift_N if positives else None,
                "out_ptr": rectangle,
                "out_stride": size_c,
            }
            self._launch(gradient_kernel, block, rows, columns, tile, outputs)
            self._multiply(block, rows, columns, rectangle[:, :wide])

    def _multiply(self, block: Block, rows: slice, columns: slice, grad_RC: Tensor) -> None:
        d_row_RD = self.d_query_MD[rows]
        if block.pick_R is not None:
            d_row_RD = self.d_doc_ND.new_zeros((len(grad_RC), self.d_doc_ND.shape[1]))
        for col_CD in self._factors(block.col_CD):
            _add_product(d_row_RD, grad_RC, col_CD[columns])
        if block.pick_R is not None:
            add_at(self.d_doc_ND, block.pick_R[rows], d_row_RD)
        if block.learns:
            query_columns = block.direction is Direction.QUERY_TO_QUERY
            d_col_ND = self.d_query_MD if query_columns else self.d_doc_ND
            for row_RD in self._factors(block.row_RD):
                _add_product(d_col_ND[columns], grad_RC.T, block.pick(row_RD, rows))

    def _with_own_gradient(self, *, docs: bool = False) -> Tensor:
        """(1,): sum over rows of <row, its gradient>."""
        block = self.problem.queries_with_documents
        x_RD, d_x_RD = (block.col_CD, self.d_doc_ND) if docs else (block.row_RD, self.d_query_MD)
        parts = [
            (x_RD[rows] * d_x_RD[rows]).sum()
            for rows in strips(len(x_RD), x_RD.shape[1] * 4, cuda=x_RD.is_cuda)
        ]
        return torch.stack(parts).sum(dim=0, keepdim=True)

    # -- operands -------------------------------------------------------------------------------

    def _operand(self, x_RD: Tensor) -> Tensor:
        """What tiles are products of: these embeddings, or their halves, which are made once."""
        if self.products is Products.EXACT or x_RD.dtype != torch.float32:
            return x_RD
        if id(x_RD) not in self._split:
            self._split[id(x_RD)] = split(x_RD)
        return self._split[id(x_RD)]

    def _factors(self, x_RD: Tensor) -> tuple[Tensor, ...]:
        """(R, D) each: the library multiplies d loss / d similarity by their sum.

        Low halves count where embeddings are alike: what they differ in is what a gradient is of.
        """
        if self.products is Products.EXACT:
            return (x_RD,)
        return self._operand(x_RD)[:, :, : x_RD.shape[1]].unbind(dim=1)

    def _tile(self, kernel: str, block: Block) -> Tile:
        return choose_tile(kernel, block, self.products)

    # -- launches -------------------------------------------------------------------------------

    def _shared(self, block: Block) -> dict[str, Any]:
        """`block_arguments`, made once: a rectangle takes the GPU no longer than they take Python."""
        if id(block) not in self._arguments:
            self._arguments[id(block)] = block_arguments(self.problem, block, self._operand)
        return self._arguments[id(block)]

    def _launch(
        self,
        kernel: Any,
        block: Block,
        rows: slice,
        columns: slice,
        tile: Tile,
        arguments: dict[str, Any],
    ) -> None:
        num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
        grid = (triton.cdiv(num_rows, tile.block_r) * triton.cdiv(num_columns, tile.block_c),)
        shared = self._shared(block)
        with torch.cuda.device_of(block.row_RD):  # type: ignore[no-untyped-call]
            kernel[grid](
                **shared,
                **arguments,
                temperature_ptr=self.temperature,
                unit_ptr=self.unit,
                first_row=rows.start,
                num_rows=num_rows,
                first_column=columns.start,
                num_columns=num_columns,
                **tile.constants(shared["width"], shared["guide_width"]),
                **tile.options(),
            )


def block_arguments(
    problem: Problem, block: Block, operand: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Pointers, shapes and flags of both kernels that a block alone decides."""
    guide, hardness = block.guide, block.hardness
    row_RD, col_CD = operand(block.row_RD), operand(block.col_CD)
    row_RG = None if guide is None else operand(guide.row_RG)
    col_CG = None if guide is None else operand(guide.col_CG)
    return _vectors(problem, block) | {
        "row_ptr": row_RD,
        "col_ptr": col_CD,
        "row_guide_ptr": row_RG,
        "col_guide_ptr": col_CG,
        "width": _loop_bound(row_RD.shape[-1]),
        "guide_width": 0 if row_RG is None else _loop_bound(row_RG.shape[-1]),
        "row_stride": row_RD.stride(0),
        "col_stride": col_CD.stride(0),
        "row_guide_stride": 0 if row_RG is None else row_RG.stride(0),
        "col_guide_stride": 0 if col_CG is None else col_CG.stride(0),
        "strength": 0.0 if hardness is None else hardness.strength,
        "P": 0 if block.target_RP is None else block.target_RP.shape[1],
        "K": 0 if block.row_key_RK is None else block.row_key_RK.shape[1],
        "L": 0 if block.col_key_CL is None else block.col_key_CL.shape[1],
        "J": 0 if block.related_key_CJ is None else block.related_key_CJ.shape[1],
        "SAME_HIDES": block.same_hides,
        "OWN_ONLY": block.own_only,
        "TARGET_HIDES": block.target_hides,
        "HARDNESS": 0 if hardness is None else HARDNESS_ON[hardness.on],
        "SPLIT": row_RD.ndim == 3,
        "SPLIT_G": row_RG is not None and row_RG.ndim == 3,
        # the interpreter takes bfloat16 products for integers'
        "WIDEN": interpreted() and row_RD.dtype == torch.bfloat16,
    }


def _vectors(problem: Problem, block: Block) -> dict[str, Tensor | None]:
    """Pointers of which kernels are told no strides."""
    guide, groups = block.guide, block.row_group_R is not None
    has_target_R = block.has_target_R
    vectors = {
        "pick_ptr": block.pick_R,
        "row_inverse_ptr": block.row_inverse_R,
        "col_inverse_ptr": block.col_inverse_C,
        "target_ptr": block.target_RP,
        "has_target_ptr": None if has_target_R is None else has_target_R.view(torch.int8),
        "positive_ptr": problem.positive_MP if block.has_positives else None,
        "row_group_ptr": block.row_group_R if groups else None,
        "col_group_ptr": block.col_group_C if groups else None,
        "row_key_ptr": block.row_key_RK,
        "col_key_ptr": block.col_key_CL,
        "own_key_ptr": block.own_key_R,
        "related_key_ptr": block.related_key_CJ,
        "row_bound_ptr": block.row_bound_R,
        "col_bound_ptr": block.col_bound_C if problem.documents_choose else None,
        "row_guide_inverse_ptr": None if guide is None else guide.row_inverse_R,
        "col_guide_inverse_ptr": None if guide is None else guide.col_inverse_C,
    }
    for name, vector in vectors.items():
        assert vector is None or vector.is_contiguous(), name
    return vectors


def _loop_bound(number: int) -> Any:
    """The interpreter makes an array of a number, which Triton 3.6 then takes for an index: numpy
    refuses that from 2.4 on. A constexpr stays the number that it is."""
    return triton.language.constexpr(number) if interpreted() else number


def _size(block: Block) -> tuple[int, int]:
    rows = block.row_RD if block.pick_R is None else block.pick_R
    return len(rows), len(block.col_CD)


def _rectangles(
    num_rows: int, num_columns: int, size_r: int, size_c: int
) -> Iterator[tuple[slice, slice]]:
    for rows in row_blocks(num_rows, size_r):
        for columns in row_blocks(num_columns, size_c):
            yield rows, columns


def _add_product(out_RD: Tensor, grad_RC: Tensor, x_CD: Tensor) -> None:
    """out += grad @ x, summed and kept in float32."""
    if grad_RC.dtype == torch.float32:
        out_RD.addmm_(grad_RC, x_CD)
    elif grad_RC.is_cuda:
        torch.addmm(out_RD, grad_RC, x_CD, out_dtype=torch.float32, out=out_RD)
    else:
        out_RD.addmm_(grad_RC.float(), x_CD.float())
