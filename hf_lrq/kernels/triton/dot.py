# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""[Q; R] z for a handful of tokens: codes become signed bytes in registers and meet int8 tensor cores."""

import triton
import triton.language as tl

from hf_lrq.kernels.triton.activations import GROUP
from hf_lrq.kernels.triton.gemv import load_factor_rows
from hf_lrq.kernels.triton.integer import signed_bytes


@triton.jit
def dot_kernel(
    byte_ptr, scale_ptr, sum_ptr, weight_ptr, group_ptr, partial_ptr, vectors, groups, groups_per_split, row_tiles,
    column_tiles, rows, scale_groups,
    EXPAND: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OFFSET: tl.constexpr,
    BIAS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_STEP: tl.constexpr,
    ALIGNED: tl.constexpr, LOAD: tl.constexpr, PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr, VECTORS: tl.constexpr, TILES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, slices of columns, blocks of vectors). partial: [slices, vectors, rows] float32.

    Bytes of activations lie in planes: word QUAD of all tiles, then of the next QUAD. TILES tiles share a scale.
    """
    quads: tl.constexpr = 4 * EXPAND
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    vector = tl.program_id(2) * VECTORS + tl.arange(0, VECTORS)
    known = (vector < vectors)[None, :]
    byte = tl.arange(0, 4 * TILES)
    total = tl.zeros((ROWS, VECTORS), tl.float32)
    first = split * groups_per_split * (16 // TILES)
    last = tl.minimum((split + 1) * groups_per_split, groups) * (16 // TILES)
    for part in range(first, last):
        tile = tl.arange(0, TILES)
        group = part // (16 // TILES)
        inside = (row < rows)[:, None] & (part * TILES + tile < column_tiles)[None, :]
        words = LOAD(
            weight_ptr + part * (TILES * TILE_STEP), row, tile, 0, inside, row_tiles, row_tiles - part * (2 * TILES),
            BITS, ALIGNED,
        )  # fmt: skip
        sums = tl.zeros((ROWS, VECTORS), tl.int32)
        for q in tl.static_range(quads):
            place = vector[None, :] * (groups * 64 * quads) + q * (groups * 64) + part * (4 * TILES) + byte[:, None]
            x = tl.load(byte_ptr + place, mask=known, other=0)
            products = PRODUCTS(words, q, BITS, M1, M2, ASM)
            for p in tl.static_range(len(products)):
                # Flipping the highest bit of a byte subtracts 128 and makes it signed.
                word = products[p] ^ 0x80808080 if BIAS == 128 else products[p]
                sums = tl.dot(signed_bytes(word), x, sums, out_dtype=tl.int32)
        digit_sum = tl.sum(
            tl.load(
                sum_ptr + vector[:, None] * (groups * 16) + part * TILES + tl.arange(0, TILES)[None, :],
                mask=(vector < vectors)[:, None], other=0.0,
            ),
            axis=1,
        )  # fmt: skip
        scale = tl.load(scale_ptr + vector * groups + group, mask=vector < vectors, other=0.0)
        value = (sums.to(tl.float32) - OFFSET * digit_sum[None, :]) * scale[None, :]
        if GROUP_SIZE:
            # A vector: the interpreter cannot combine a mask with a number.
            scale_group = tl.zeros((ROWS,), tl.int32) + part * (16 * TILES) // GROUP_SIZE
            present = (row < rows) & (scale_group < scale_groups)
            place = group_ptr + row * scale_groups + scale_group
            value *= tl.load(place, mask=present, other=0.0).to(tl.float32)[:, None]
        total += value
    place = partial_ptr + (split * vectors + vector)[None, :] * rows + row[:, None]
    tl.store(place, total, mask=(row < rows)[:, None] & known)


@triton.jit
def factor_dot_kernel(
    z_ptr, factor_ptr, partial_ptr, tokens, padded, columns, rank, groups, groups_per_split,
    NIBBLES: tl.constexpr, RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """R z. Grid (blocks of rows of R, slices of columns, blocks of tokens). partial: [slices, tokens, rank] float32."""
    row = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    split = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    step: tl.constexpr = 64
    total = tl.zeros((RANKS, TOKENS), tl.float32)
    first = split * groups_per_split * (GROUP // step)
    last = tl.minimum((split + 1) * groups_per_split, groups) * (GROUP // step)
    for part in range(first, last):
        column = part * step + tl.arange(0, step)
        mask = (row < rank)[:, None] & (column < columns)[None, :]
        factor = load_factor_rows(factor_ptr, row[:, None], column[None, :], mask, columns, NIBBLES)
        z = tl.load(z_ptr + token[None, :] * padded + column[:, None], mask=(token < tokens)[None, :], other=0.0)
        # TF32 would round z to 11 bits; R is thin, so its products in full float32 cost little.
        total = tl.dot(factor, z, total, input_precision="ieee")
    place = partial_ptr + (split * tokens + token)[None, :] * rank + row[:, None]
    tl.store(place, total, mask=(row < rank)[:, None] & (token < tokens)[None, :])
