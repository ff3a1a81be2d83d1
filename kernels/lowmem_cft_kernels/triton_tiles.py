"""The two tile kernels of the loss: log-sum-exps of a tile, and d loss / d z of a tile.

Both compute a BLOCK_R x BLOCK_C tile of a block's similarities (see `problem`) in float32
registers, decide from vectors over its rows and columns who is hidden, and write what is O(rows +
columns), or the tile of the gradient. No program adds to what another one writes: every sum is
taken in one order, so two runs give the same bits.

Prefixes: `r_` of the rows, `c_` of the columns of a tile, `rc_` of its elements. A pointer that is
None stands for an option that is off, and is compiled away.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from lowmem_cft_kernels import workspace

COLUMN_PADDING = tl.constexpr(workspace.COLUMN_PADDING)

FP16_GAIN = tl.constexpr(16384.0)
"""Factor of numbers of at most 1 where they are held in float16, which ends at 65504 and loses bits
below 6e-5."""


@triton.jit  # type: ignore[untyped-decorator]
def place(num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(tile row, tile column) of this program: GROUP tile rows at a time share their columns."""
    tiles_r, tiles_c = tl.cdiv(num_rows, BLOCK_R), tl.cdiv(num_columns, BLOCK_C)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_c) * GROUP
    group = min(tiles_r - first, GROUP)
    return first + program % (GROUP * tiles_c) % group, program % (GROUP * tiles_c) // group


@triton.jit  # type: ignore[untyped-decorator]
def products(  # type: ignore[no-untyped-def]
    row_ptr,
    col_ptr,
    r_index,
    c_index,
    row_stride,
    col_stride,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """float32 (BLOCK_R, BLOCK_C): rows times columns; WIDEN: convert before the product.

    SPLIT: both are `width` high numbers and as many low ones, a whole number of BLOCK_D.
    """
    d = tl.arange(0, BLOCK_D)
    row_ptrs = row_ptr + r_index.to(tl.int64)[:, None] * row_stride + d[None, :]
    col_ptrs = col_ptr + c_index.to(tl.int64)[:, None] * col_stride + d[None, :]
    rc_sum = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        if EVEN_D:
            rows, cols = tl.load(row_ptrs), tl.load(col_ptrs)
        else:
            inside = (start + d < width)[None, :]
            rows = tl.load(row_ptrs, mask=inside, other=0.0)
            cols = tl.load(col_ptrs, mask=inside, other=0.0)
        if WIDEN:
            rows, cols = rows.to(tl.float32), cols.to(tl.float32)
        if SPLIT:
            tl.static_assert(EVEN_D)
            low_rows, low_cols = tl.load(row_ptrs + width), tl.load(col_ptrs + width)
            if WIDEN:
                low_rows, low_cols = low_rows.to(tl.float32), low_cols.to(tl.float32)
            rc_sum = tl.dot(rows, tl.trans(low_cols), rc_sum, input_precision="ieee")
            rc_sum = tl.dot(low_rows, tl.trans(cols), rc_sum, input_precision="ieee")
        rc_sum = tl.dot(rows, tl.trans(cols), rc_sum, input_precision="ieee")
        row_ptrs += BLOCK_D
        col_ptrs += BLOCK_D
    return rc_sum


@triton.jit  # type: ignore[untyped-decorator]
def similarities(  # type: ignore[no-untyped-def]
    row_ptr,
    col_ptr,
    pick_ptr,
    row_inverse_ptr,
    col_inverse_ptr,
    r_place,
    c_place,
    row_stride,
    col_stride,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Products, of unit vectors where inverse norms are given; rows picked where a pick is."""
    r_index = r_place
    if pick_ptr is not None:
        r_index = tl.load(pick_ptr + r_place)
    rc_sim = products(
        row_ptr, col_ptr, r_index, c_place, row_stride, col_stride, width,
        BLOCK_R, BLOCK_C, BLOCK_D, EVEN_D, WIDEN, SPLIT,
    )  # fmt: skip
    if row_inverse_ptr is not None:
        r_inverse = tl.load(row_inverse_ptr + r_index)
        c_inverse = tl.load(col_inverse_ptr + c_place)
        rc_sim = rc_sim * r_inverse[:, None] * c_inverse[None, :]
    return rc_sim


@triton.jit  # type: ignore[untyped-decorator]
def own_positives(  # type: ignore[no-untyped-def]
    target_ptr, has_target_ptr, r_place, c_place, P: tl.constexpr
):
    """bool (BLOCK_R, BLOCK_C): the column is a positive of the row's query."""
    rc_own = c_place[None, :] == tl.load(target_ptr + r_place.to(tl.int64) * P)[:, None]
    for p in tl.static_range(1, P):
        rc_own |= c_place[None, :] == tl.load(target_ptr + r_place.to(tl.int64) * P + p)[:, None]
    return rc_own & (tl.load(has_target_ptr + r_place) != 0)[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def hidden_by_vectors(  # type: ignore[no-untyped-def]
    row_group_ptr,
    col_group_ptr,
    row_key_ptr,
    col_key_ptr,
    r_place,
    c_place,
    rc_hidden,
    SAME_HIDES: tl.constexpr,
    OWN_ONLY: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
):
    """`rc_hidden`, and whom groups and keys hide."""
    if SAME_HIDES or OWN_ONLY:
        r_group, c_group = tl.load(row_group_ptr + r_place), tl.load(col_group_ptr + c_place)
        if SAME_HIDES:
            rc_hidden |= r_group[:, None] == c_group[None, :]
        else:
            rc_hidden |= (r_group[:, None] != c_group[None, :]) & (c_group >= 0)[None, :]
    for k in tl.static_range(K):
        r_key = tl.load(row_key_ptr + r_place.to(tl.int64) * K + k)
        for l in tl.static_range(L):
            c_key = tl.load(col_key_ptr + c_place.to(tl.int64) * L + l)
            rc_hidden |= r_key[:, None] == c_key[None, :]
    return rc_hidden


@triton.jit  # type: ignore[untyped-decorator]
def hardened(  # type: ignore[no-untyped-def]
    rc_row, rc_own, row_group_ptr, col_group_ptr, r_place, c_place,
    temperature, strength, ON: tl.constexpr, HAS_OWN: tl.constexpr,
):  # fmt: skip
    """Masked logits with the hardness of negatives; ON: see `HARDNESS_ON`."""
    # a logit in units of log2 is s log2(e) / temperature, hidden ones are -inf and stay so
    rc_extra = tl.where(rc_row == float("-inf"), 0.0, rc_row * (strength * temperature))
    if ON != 3:
        if col_group_ptr is None:
            if ON == 1:
                rc_extra = tl.zeros_like(rc_extra)
        else:
            r_group, c_group = tl.load(row_group_ptr + r_place), tl.load(col_group_ptr + c_place)
            rc_given = r_group[:, None] == c_group[None, :]
            rc_extra = tl.where(rc_given if ON == 1 else rc_given == 0, rc_extra, 0.0)
    if HAS_OWN:
        rc_extra = tl.where(rc_own, 0.0, rc_extra)
    return rc_row + rc_extra


@triton.jit  # type: ignore[untyped-decorator]
def masked(rc_logit, rc_hidden, rc_own, rc_outside, target_ptr, TARGET_HIDES: tl.constexpr):  # type: ignore[no-untyped-def]
    """-inf where hidden; a row's positives are hidden from it or never are."""
    if target_ptr is not None:
        if TARGET_HIDES:
            rc_hidden |= rc_own
        else:
            rc_hidden &= rc_own == 0
    return tl.where(rc_hidden | rc_outside, float("-inf"), rc_logit)


@triton.jit  # type: ignore[untyped-decorator]
def tile(  # type: ignore[no-untyped-def]
    row_ptr, col_ptr, pick_ptr, row_inverse_ptr, col_inverse_ptr,
    target_ptr, has_target_ptr, positive_ptr,
    row_group_ptr, col_group_ptr, row_key_ptr, col_key_ptr, own_key_ptr, related_key_ptr,
    row_bound_ptr, col_bound_ptr,
    row_guide_ptr, col_guide_ptr, row_guide_inverse_ptr, col_guide_inverse_ptr,
    r_place, c_place, rc_outside, unit, width, guide_width,
    row_stride, col_stride, row_guide_stride, col_guide_stride,
    P: tl.constexpr, K: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
    SAME_HIDES: tl.constexpr, OWN_ONLY: tl.constexpr, TARGET_HIDES: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_G: tl.constexpr, WIDEN: tl.constexpr,
    SPLIT: tl.constexpr, SPLIT_G: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits in units of log2 as rows see them and as columns do, and where positives are.

    -inf is what they don't see; `rc_outside` marks places beyond the matrix.
    """
    rc_sim = similarities(
        row_ptr, col_ptr, pick_ptr, row_inverse_ptr, col_inverse_ptr, r_place, c_place,
        row_stride, col_stride, width, BLOCK_R, BLOCK_C, BLOCK_D, EVEN_D, WIDEN, SPLIT,
    )  # fmt: skip
    rc_own = rc_outside
    if target_ptr is not None:
        rc_own = own_positives(target_ptr, has_target_ptr, r_place, c_place, P)
    if positive_ptr is not None:  # the number that the loss takes, whatever order it was added in
        for p in tl.static_range(P):
            r_target = tl.load(target_ptr + r_place.to(tl.int64) * P + p)
            r_positive = tl.load(positive_ptr + r_place.to(tl.int64) * P + p)
            rc_sim = tl.where(r_target[:, None] == c_place[None, :], r_positive[:, None], rc_sim)
    rc_hidden = hidden_by_vectors(
        row_group_ptr, col_group_ptr, row_key_ptr, col_key_ptr, r_place, c_place,
        rc_outside, SAME_HIDES, OWN_ONLY, K, L,
    )  # fmt: skip
    rc_col_hidden = rc_hidden
    if own_key_ptr is not None:
        r_key = tl.load(own_key_ptr + r_place)
        for j in tl.static_range(J):
            c_key = tl.load(related_key_ptr + c_place.to(tl.int64) * J + j)
            rc_col_hidden |= r_key[:, None] == c_key[None, :]
    rc_logit = rc_sim * unit
    if row_bound_ptr is not None:
        rc_guide = rc_sim
        if row_guide_ptr is not None:
            rc_guide = similarities(
                row_guide_ptr, col_guide_ptr, pick_ptr, row_guide_inverse_ptr,
                col_guide_inverse_ptr, r_place, c_place, row_guide_stride, col_guide_stride,
                guide_width, BLOCK_R, BLOCK_C, BLOCK_D, EVEN_G, WIDEN, SPLIT_G,
            )  # fmt: skip
        rc_above = rc_hidden | (rc_guide > tl.load(row_bound_ptr + r_place)[:, None])
        rc_row = masked(rc_logit, rc_above, rc_own, rc_outside, target_ptr, TARGET_HIDES)
        rc_col = rc_row
        if col_bound_ptr is not None:
            rc_above = rc_col_hidden | (rc_guide > tl.load(col_bound_ptr + c_place)[None, :])
            rc_col = masked(rc_logit, rc_above, rc_own, rc_outside, target_ptr, TARGET_HIDES)
    else:
        rc_row = masked(rc_logit, rc_hidden, rc_own, rc_outside, target_ptr, TARGET_HIDES)
        rc_col = rc_row
        if own_key_ptr is not None:
            rc_col = masked(rc_logit, rc_col_hidden, rc_own, rc_outside, target_ptr, TARGET_HIDES)
    return rc_row, rc_col, rc_own


@triton.jit  # type: ignore[untyped-decorator]
def places(  # type: ignore[no-untyped-def]
    first_row,
    num_rows,
    first_column,
    num_columns,
    tile_r,
    tile_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Local places of a tile's rows and columns, the same in the block but never beyond it."""
    r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    r_place = first_row + tl.minimum(r, num_rows - 1)
    c_place = first_column + tl.minimum(c, num_columns - 1)
    return r, c, r_place, c_place


@triton.jit
def inside_padded(c, num_columns):  # type: ignore[no-untyped-def]
    """Columns of a held tile, whose rows end at a whole COLUMN_PADDING.

    With a bound that is no multiple of what one instruction stores, Triton stores number by number.
    """
    return c < tl.cdiv(num_columns, COLUMN_PADDING) * COLUMN_PADDING


@triton.jit(do_not_specialize=["first_row", "first_column", "num_rows", "num_columns", "strength"])  # type: ignore[untyped-decorator]
def lse_kernel(  # type: ignore[no-untyped-def]
    row_ptr, col_ptr, pick_ptr, row_inverse_ptr, col_inverse_ptr,
    target_ptr, has_target_ptr, positive_ptr,
    row_group_ptr, col_group_ptr, row_key_ptr, col_key_ptr, own_key_ptr, related_key_ptr,
    row_bound_ptr, col_bound_ptr,
    row_guide_ptr, col_guide_ptr, row_guide_inverse_ptr, col_guide_inverse_ptr,
    best_ptr, temperature_ptr, unit_ptr,
    row_top_ptr, row_total_ptr, col_top_ptr, col_total_ptr,
    above_ptr, seen_ptr, sum_ptr, exp_ptr,
    first_row, num_rows, first_column, num_columns, width, guide_width,
    row_stride, col_stride, row_guide_stride, col_guide_stride,
    exp_stride, strength,
    P: tl.constexpr, K: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
    SAME_HIDES: tl.constexpr, OWN_ONLY: tl.constexpr, TARGET_HIDES: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_G: tl.constexpr, WIDEN: tl.constexpr,
    SPLIT: tl.constexpr, SPLIT_G: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    HARDNESS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Maximum and shifted sum of exp2(z log2 e) of each tile's rows, and of its columns.

    Rows' go to (tiles of columns, num_rows), columns' to (tiles of rows, num_columns), in
    float32. Beside them, per row, how many visible columns are above the best positive (int32),
    how many are visible (int32) and the sum of their similarities. What has no pointer is left
    out.

    `exp` gets the rows' exp2 themselves, to be scaled later: maxima are rounded up to whole numbers
    for it, so that scaling by what they differ is exact.
    """
    tile_r, tile_c = place(num_rows, num_columns, BLOCK_R, BLOCK_C, GROUP)
    r, c, r_place, c_place = places(
        first_row, num_rows, first_column, num_columns, tile_r, tile_c, BLOCK_R, BLOCK_C
    )
    rc_outside = (r >= num_rows)[:, None] | (c >= num_columns)[None, :]
    temperature, unit = tl.load(temperature_ptr), tl.load(unit_ptr)
    rc_row, rc_col, rc_own = tile(
        row_ptr, col_ptr, pick_ptr, row_inverse_ptr, col_inverse_ptr,
        target_ptr, has_target_ptr, positive_ptr,
        row_group_ptr, col_group_ptr, row_key_ptr, col_key_ptr, own_key_ptr, related_key_ptr,
        row_bound_ptr, col_bound_ptr,
        row_guide_ptr, col_guide_ptr, row_guide_inverse_ptr, col_guide_inverse_ptr,
        r_place, c_place, rc_outside, unit, width, guide_width,
        row_stride, col_stride, row_guide_stride, col_guide_stride,
        P, K, L, J, SAME_HIDES, OWN_ONLY, TARGET_HIDES, EVEN_D, EVEN_G, WIDEN,
        SPLIT, SPLIT_G, BLOCK_R, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    r_out, c_out = tile_c.to(tl.int64) * num_rows + r, tile_r.to(tl.int64) * num_columns + c
    r_inside, c_inside = r < num_rows, c < num_columns
    if above_ptr is not None:
        rc_above = rc_row > tl.load(best_ptr + r_place)[:, None] * unit
        rc_visible = rc_row > float("-inf")
        # counted in floats: for compute capability 7.5, integers are packed by way of the stack
        r_above = tl.sum(tl.where(rc_above, 1.0, 0.0), 1).to(tl.int32)
        tl.store(above_ptr + r_out, r_above, mask=r_inside)
        r_visible = tl.sum(tl.where(rc_visible, 1.0, 0.0), 1).to(tl.int32)
        tl.store(seen_ptr + r_out, r_visible, mask=r_inside)
        r_sum = tl.sum(tl.where(rc_visible, rc_row, 0.0), 1) / unit
        tl.store(sum_ptr + r_out, r_sum, mask=r_inside)
    if col_top_ptr is not None:
        c_top = tl.max(rc_col, 0)
        c_shift = tl.where(c_top == float("-inf"), 0.0, c_top)
        tl.store(col_top_ptr + c_out, c_top, mask=c_inside)
        c_total = tl.sum(tl.exp2(rc_col - c_shift[None, :]), 0)
        tl.store(col_total_ptr + c_out, c_total, mask=c_inside)
    if row_top_ptr is not None:
        if HARDNESS:
            rc_row = hardened(
                rc_row, rc_own, row_group_ptr, col_group_ptr, r_place, c_place,
                temperature, strength, HARDNESS, target_ptr is not None,
            )  # fmt: skip
        r_top = tl.max(rc_row, 1)
        if exp_ptr is not None:
            r_top = tl.ceil(r_top)
        r_shift = tl.where(r_top == float("-inf"), 0.0, r_top)
        rc_exp = tl.exp2(rc_row - r_shift[:, None])
        tl.store(row_top_ptr + r_out, r_top, mask=r_inside)
        tl.store(row_total_ptr + r_out, tl.sum(rc_exp, 1), mask=r_inside)
        if exp_ptr is not None:
            if exp_ptr.dtype.element_ty == tl.float16:
                rc_exp *= FP16_GAIN
            exp_ptrs = exp_ptr + r.to(tl.int64)[:, None] * exp_stride + c[None, :]
            inside = r_inside[:, None] & inside_padded(c, num_columns)[None, :]
            tl.store(exp_ptrs, rc_exp.to(exp_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row", "first_column", "num_rows", "num_columns", "strength"])  # type: ignore[untyped-decorator]
def gradient_kernel(  # type: ignore[no-untyped-def]
    row_ptr, col_ptr, pick_ptr, row_inverse_ptr, col_inverse_ptr,
    target_ptr, has_target_ptr, positive_ptr,
    row_group_ptr, col_group_ptr, row_key_ptr, col_key_ptr, own_key_ptr, related_key_ptr,
    row_bound_ptr, col_bound_ptr,
    row_guide_ptr, col_guide_ptr, row_guide_inverse_ptr, col_guide_inverse_ptr,
    weight_ptr, temperature_ptr, unit_ptr, scale_ptr, row_shift_ptr, col_shift_ptr, out_ptr,
    first_row, num_rows, first_column, num_columns, width, guide_width,
    row_stride, col_stride, row_guide_stride, col_guide_stride,
    out_stride, strength,
    P: tl.constexpr, K: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
    SAME_HIDES: tl.constexpr, OWN_ONLY: tl.constexpr, TARGET_HIDES: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_G: tl.constexpr, WIDEN: tl.constexpr,
    SPLIT: tl.constexpr, SPLIT_G: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    HARDNESS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """scale x d loss / d similarity of a tile (times inverse norms), in the dtype of `out`.

    Row and column shifts are rho and gamma of `problem` in units of log2; one that has no pointer
    belongs to a softmax that the loss does not have.
    """
    tile_r, tile_c = place(num_rows, num_columns, BLOCK_R, BLOCK_C, GROUP)
    r, c, r_place, c_place = places(
        first_row, num_rows, first_column, num_columns, tile_r, tile_c, BLOCK_R, BLOCK_C
    )
    rc_outside = (r >= num_rows)[:, None] | (c >= num_columns)[None, :]
    temperature, unit = tl.load(temperature_ptr), tl.load(unit_ptr)
    rc_row, rc_col, rc_own = tile(
        row_ptr, col_ptr, pick_ptr, row_inverse_ptr, col_inverse_ptr,
        target_ptr, has_target_ptr, positive_ptr,
        row_group_ptr, col_group_ptr, row_key_ptr, col_key_ptr, own_key_ptr, related_key_ptr,
        row_bound_ptr, col_bound_ptr,
        row_guide_ptr, col_guide_ptr, row_guide_inverse_ptr, col_guide_inverse_ptr,
        r_place, c_place, rc_outside, unit, width, guide_width,
        row_stride, col_stride, row_guide_stride, col_guide_stride,
        P, K, L, J, SAME_HIDES, OWN_ONLY, TARGET_HIDES, EVEN_D, EVEN_G, WIDEN,
        SPLIT, SPLIT_G, BLOCK_R, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    rc_grad = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    if col_shift_ptr is not None:
        rc_grad += tl.exp2(rc_col - tl.load(col_shift_ptr + c_place)[None, :])
    if row_shift_ptr is not None:
        if HARDNESS:
            rc_row = hardened(
                rc_row, rc_own, row_group_ptr, col_group_ptr, r_place, c_place,
                temperature, strength, HARDNESS, target_ptr is not None,
            )  # fmt: skip
        rc_grad += tl.exp2(rc_row - tl.load(row_shift_ptr + r_place)[:, None])
    if weight_ptr is not None:
        for p in tl.static_range(P):
            r_target = tl.load(target_ptr + r_place.to(tl.int64) * P + p)
            r_weight = tl.load(weight_ptr + r_place.to(tl.int64) * P + p)
            rc_here = r_target[:, None] == c_place[None, :]
            rc_grad -= tl.where(rc_here, r_weight[:, None], 0.0)
    rc_grad *= tl.load(scale_ptr)
    if row_inverse_ptr is not None:
        r_index = r_place
        if pick_ptr is not None:
            r_index = tl.load(pick_ptr + r_place)
        rc_grad *= tl.load(row_inverse_ptr + r_index)[:, None]
        rc_grad *= tl.load(col_inverse_ptr + c_place)[None, :]
    out_ptrs = out_ptr + r.to(tl.int64)[:, None] * out_stride + c[None, :]
    inside = (r < num_rows)[:, None] & inside_padded(c, num_columns)[None, :]
    tl.store(out_ptrs, rc_grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_parts", "first", "count"])  # type: ignore[untyped-decorator]
def merge_kernel(  # type: ignore[no-untyped-def]
    part_top_ptr, part_total_ptr, part_above_ptr, part_seen_ptr, part_sum_ptr,
    top_ptr, total_ptr, above_ptr, seen_ptr, sum_ptr,
    num_parts, first, count,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add what `lse_kernel` wrote of `count` rows (or columns) to what is held of them.

    Parts are (num_parts, count), what is held begins at `first`. Maxima and shifted sums of exp2 go
    together, as do the three of the tally; what has no pointer is left out. PARTS parts of BLOCK
    rows at a time.
    """
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r_inside, place = r < count, first + r
    if top_ptr is not None:
        r_top = tl.load(top_ptr + place, mask=r_inside, other=float("-inf"))
        r_total = tl.load(total_ptr + place, mask=r_inside, other=0.0)
    if above_ptr is not None:
        r_above, r_seen = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        r_sum = tl.load(sum_ptr + place, mask=r_inside, other=0.0)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < num_parts)[:, None] & r_inside[None, :]
        at = part.to(tl.int64)[:, None] * count + r[None, :]
        if top_ptr is not None:
            pr_top = tl.load(part_top_ptr + at, mask=inside, other=float("-inf"))
            pr_total = tl.load(part_total_ptr + at, mask=inside, other=0.0)
            r_new = tl.maximum(r_top, tl.max(pr_top, 0))
            r_shift = tl.where(r_new == float("-inf"), 0.0, r_new)
            r_total = r_total * tl.exp2(r_top - r_shift)
            r_total += tl.sum(pr_total * tl.exp2(pr_top - r_shift[None, :]), 0)
            r_top = r_new
        if above_ptr is not None:  # in floats, as in `lse_kernel`: exact up to 2^24
            pr_above = tl.load(part_above_ptr + at, mask=inside, other=0)
            pr_seen = tl.load(part_seen_ptr + at, mask=inside, other=0)
            r_above += tl.sum(pr_above.to(tl.float32), 0)
            r_seen += tl.sum(pr_seen.to(tl.float32), 0)
            r_sum += tl.sum(tl.load(part_sum_ptr + at, mask=inside, other=0.0), 0)
    if top_ptr is not None:
        tl.store(top_ptr + place, r_top, mask=r_inside)
        tl.store(total_ptr + place, r_total, mask=r_inside)
    if above_ptr is not None:
        r_above_before = tl.load(above_ptr + place, mask=r_inside, other=0)
        r_seen_before = tl.load(seen_ptr + place, mask=r_inside, other=0)
        tl.store(above_ptr + place, r_above_before + r_above.to(tl.int64), mask=r_inside)
        tl.store(seen_ptr + place, r_seen_before + r_seen.to(tl.int64), mask=r_inside)
        tl.store(sum_ptr + place, r_sum, mask=r_inside)


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_columns"])  # type: ignore[untyped-decorator]
def scale_kernel(  # type: ignore[no-untyped-def]
    held_ptr,
    part_top_ptr,
    top_ptr,
    total_ptr,
    target_ptr,
    positive_ptr,
    weight_ptr,
    unit_ptr,
    scale_ptr,
    row_inverse_ptr,
    col_inverse_ptr,
    first_row,
    num_rows,
    num_columns,
    held_stride,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PART_R: tl.constexpr,
):
    """Turn `lse_kernel`'s `exp` into what `gradient_kernel` gives where only rows choose, in place.

    `part_top` (tiles of columns, num_rows) are the maxima that a tile's rows are held with, `top`
    and `total` the rows' own. Positives, where exp2(z - rho) - weight cancels, are computed anew in
    float32. PART_R rows a program.
    """
    tiles_c = tl.cdiv(num_columns, BLOCK_C)
    part, tile_c = tl.program_id(0) // tiles_c, tl.program_id(0) % tiles_c
    r, c = part * PART_R + tl.arange(0, PART_R), tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    r_inside = r < num_rows
    inside = r_inside[:, None] & inside_padded(c, num_columns)[None, :]
    r_place = (first_row + tl.minimum(r, num_rows - 1)).to(tl.int64)
    held_ptrs = held_ptr + r.to(tl.int64)[:, None] * held_stride + c[None, :]
    r_weight = tl.zeros((PART_R,), dtype=tl.float32)
    for p in tl.static_range(P):
        r_weight += tl.load(weight_ptr + r_place * P + p)
    r_top, r_total = tl.load(top_ptr + r_place), tl.load(total_ptr + r_place)
    part_top_ptrs = part_top_ptr + tile_c.to(tl.int64) * num_rows + r
    r_part_top = tl.load(part_top_ptrs, mask=r_inside, other=float("-inf"))
    r_share = r_weight / r_total
    r_factor = tl.exp2(r_part_top - r_top) * r_share
    r_factor = tl.where(r_weight > 0, r_factor, 0.0)  # without weight, it may see nothing at all
    if held_ptr.dtype.element_ty == tl.float16:
        r_factor /= FP16_GAIN
    rc_grad = tl.load(held_ptrs, mask=inside, other=0.0).to(tl.float32) * r_factor[:, None]
    unit = tl.load(unit_ptr)
    for p in tl.static_range(P):
        r_target = tl.load(target_ptr + r_place * P + p)
        r_exp = tl.exp2(tl.load(positive_ptr + r_place * P + p) * unit - r_top)
        # a row that sees its positive alone gets no gradient, whatever a division rounds
        r_exp = tl.where(r_exp == r_total, r_weight, r_exp * r_share)
        r_exp = tl.where(r_weight > 0, r_exp, 0.0)
        rc_grad = tl.where(r_target[:, None] == c[None, :], r_exp[:, None], rc_grad)
    for p in tl.static_range(P):
        r_target = tl.load(target_ptr + r_place * P + p)
        r_own = tl.load(weight_ptr + r_place * P + p)
        rc_grad -= tl.where(r_target[:, None] == c[None, :], r_own[:, None], 0.0)
    rc_grad *= tl.load(scale_ptr)
    if row_inverse_ptr is not None:
        c_place = tl.minimum(c, num_columns - 1)
        rc_grad *= tl.load(row_inverse_ptr + r_place)[:, None]
        rc_grad *= tl.load(col_inverse_ptr + c_place)[None, :]
    tl.store(held_ptrs, rc_grad.to(held_ptr.dtype.element_ty), mask=inside)
