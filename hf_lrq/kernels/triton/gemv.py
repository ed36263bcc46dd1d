# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""K1 for one to three tokens: [Q; R] z by integer dot products of four bytes, summed over slices of the columns."""

import triton
import triton.language as tl

from hf_lrq.kernels.triton.activations import GROUP, prepare
from hf_lrq.kernels.triton.integer import dot4, replaced


@triton.jit
def load_factor_rows(factor_ptr, row, column, mask, columns, NIBBLES: tl.constexpr):
    """Entries [row, column] of R, float32 without their scale."""
    if NIBBLES:
        byte = tl.load(factor_ptr + (row // 2) * columns + column, mask=mask, other=0).to(tl.int32)
        value = ((byte >> (4 * (row % 2))) & 15) - 8
    else:
        value = tl.load(factor_ptr + row * columns + column, mask=mask, other=0)
    return value.to(tl.float32)


@triton.jit
def _code_rows(
    byte_ptr, scale_ptr, sum_ptr, weight_ptr, group_ptr, partial_ptr, block, split, first, last, groups,
    row_tiles, column_tiles, rows, scale_groups,
    TOKENS: tl.constexpr, DIGITS: tl.constexpr, EXPAND: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr,
    M2: tl.constexpr, OFFSET: tl.constexpr, GROUP_SIZE: tl.constexpr, PERIOD: tl.constexpr, TILE_STEP: tl.constexpr,
    ALIGNED: tl.constexpr, LOAD: tl.constexpr,
    PRODUCTS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    quads: tl.constexpr = 4 * EXPAND
    vectors: tl.constexpr = TOKENS * DIGITS
    row = block * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, TILES)
    word_ptr = byte_ptr.to(tl.pointer_type(tl.int32))
    total = (tl.zeros((ROWS, TILES), tl.float32),) * TOKENS
    for group in range(first, last):
        weights = weight_ptr + group * (16 * TILE_STEP)
        x_words = word_ptr + group * (16 * quads) + lane * quads
        # Integers are summed over the PERIOD tiles that share all scales, and only then scaled.
        for part in tl.static_range(0, 16, PERIOD):
            sums = (tl.zeros((ROWS, TILES), tl.int32),) * vectors
            offsets = (tl.zeros((TILES,), tl.float32),) * vectors
            for t in tl.static_range(part, part + PERIOD, TILES):
                inside = (row < rows)[:, None] & (group * 16 + t + lane < column_tiles)[None, :] if MASKED else None
                words = LOAD(weights, row, lane, t, inside, row_tiles, row_tiles - group * 32, BITS, ALIGNED)
                for c in tl.static_range(vectors):
                    digit_sum = tl.load(sum_ptr + c * (groups * 16) + group * 16 + lane + t)
                    offsets = replaced(offsets, c, offsets[c] + digit_sum)
                for q in tl.static_range(quads):
                    products = PRODUCTS(words, q, BITS, M1, M2, ASM)
                    for c in tl.static_range(vectors):
                        x = tl.load(x_words + c * (groups * 16 * quads) + (t * quads + q))
                        x = tl.broadcast_to(x[None, :], (ROWS, TILES))
                        for p in tl.static_range(len(products)):
                            sums = replaced(sums, c, dot4(products[p], x, sums[c], ASM))
            for c in tl.static_range(vectors):
                scale = tl.load(scale_ptr + c * groups + group)
                value = (sums[c].to(tl.float32) - OFFSET * offsets[c][None, :]) * scale
                if GROUP_SIZE:
                    # A vector: the interpreter cannot combine a mask with a number.
                    scale_group = tl.zeros((ROWS,), tl.int32) + (group * 256 + part * 16) // GROUP_SIZE
                    place = group_ptr + (row * scale_groups + scale_group)[:, None]
                    if MASKED:
                        known = ((row < rows) & (scale_group < scale_groups))[:, None]
                        value *= tl.load(place, mask=known, other=0.0).to(tl.float32)
                    else:
                        value *= tl.load(place).to(tl.float32)
                total = replaced(total, c // DIGITS, total[c // DIGITS] + value)
    for token in tl.static_range(TOKENS):
        place = partial_ptr + (split * TOKENS + token) * rows + row
        tl.store(place, tl.sum(total[token], axis=1), mask=row < rows)


@triton.jit
def _factor_rows(
    z_ptr, factor_ptr, partial_ptr, block, split, first, last, groups, columns, rank,
    TOKENS: tl.constexpr, NIBBLES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = block * RANKS + tl.arange(0, RANKS)[:, None]
    total = (tl.zeros((RANKS, GROUP), tl.float32),) * TOKENS
    for group in range(first, last):
        column = group * GROUP + tl.arange(0, GROUP)
        mask = (row < rank) & (column < columns)[None, :]
        factor = load_factor_rows(factor_ptr, row, column[None, :], mask, columns, NIBBLES)
        for token in tl.static_range(TOKENS):
            z = tl.load(z_ptr + token * (groups * GROUP) + column)
            total = replaced(total, token, total[token] + factor * z[None, :])
    rank_row = block * RANKS + tl.arange(0, RANKS)
    for token in tl.static_range(TOKENS):
        place = partial_ptr + (split * TOKENS + token) * rank + rank_row
        tl.store(place, tl.sum(total[token], axis=1), mask=rank_row < rank)


@triton.jit
def gemv_kernel(
    x_ptr, rot_ptr, z_ptr, byte_ptr, scale_ptr, sum_ptr, weight_ptr, group_ptr, factor_ptr, partial_ptr,
    factor_partial_ptr, columns, x_stride, groups, groups_per_split, code_blocks, row_tiles, column_tiles, rows,
    scale_groups, rank,
    TOKENS: tl.constexpr, DIGITS: tl.constexpr, EXPAND: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr,
    M2: tl.constexpr, OFFSET: tl.constexpr, GROUP_SIZE: tl.constexpr, PERIOD: tl.constexpr, TILE_STEP: tl.constexpr,
    ALIGNED: tl.constexpr, LOAD: tl.constexpr, PRODUCTS: tl.constexpr, MIX: tl.constexpr, SPREAD: tl.constexpr,
    LOG_BLOCK: tl.constexpr, NIBBLES: tl.constexpr, FUSED: tl.constexpr, AT_ONCE: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, RANKS: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of code rows, then blocks of rows of R; slices of columns).

    partial [slices, TOKENS, rows] and factor_partial [slices, TOKENS, rank], float32, every element written.

    With FUSED, each program prepares the activations of its slice first, AT_ONCE groups of 256 columns at a time, in
    the buffers that `prepare_kernel` would fill. Programs of one slice write the same bytes to the same places, and
    each reads only after its own writes and a barrier, so what it reads does not depend on the others.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, groups)
    if FUSED:
        for token in tl.static_range(TOKENS):
            for group in range(first, last, AT_ONCE):
                prepare(
                    x_ptr, rot_ptr, z_ptr, byte_ptr, scale_ptr, sum_ptr, token, group, last, groups, columns, x_stride,
                    4 * EXPAND, 1, LOG_BLOCK, DIGITS, EXPAND, BITS, MIX, SPREAD, AT_ONCE,
                )  # fmt: skip
        tl.debug_barrier()
    if block < code_blocks:
        _code_rows(
            byte_ptr, scale_ptr, sum_ptr, weight_ptr, group_ptr, partial_ptr, block, split, first, last, groups,
            row_tiles, column_tiles, rows, scale_groups, TOKENS, DIGITS, EXPAND, BITS, M1, M2, OFFSET,
            GROUP_SIZE, PERIOD, TILE_STEP, ALIGNED, LOAD, PRODUCTS, ROWS, TILES, MASKED, ASM,
        )  # fmt: skip
    elif factor_ptr is not None:
        _factor_rows(
            z_ptr, factor_ptr, factor_partial_ptr, block - code_blocks, split, first, last, groups, columns, rank,
            TOKENS, NIBBLES, RANKS,
        )  # fmt: skip
