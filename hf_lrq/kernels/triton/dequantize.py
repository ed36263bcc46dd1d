# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Codes to a dense matrix, tile by tile."""

import triton
import triton.language as tl

from hf_lrq.kernels.triton.integer import interleave, rounded


@triton.jit
def dequantize_kernel(
    weight_ptr, scales_ptr, out_ptr, first_row, last_row, columns, row_tiles, column_tiles, scale_groups,
    gain,
    BITS: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, OFFSET: tl.constexpr, GROUP_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr, LOAD: tl.constexpr, COLUMN: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS rows, blocks of TILES tiles). out: [last_row - first_row, columns]."""
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    known_row = (row < last_row)[:, None]
    words = LOAD(
        weight_ptr, row, tile, 0, known_row & (tile < column_tiles)[None, :], row_tiles, row_tiles, BITS, ALIGNED
    )
    index = tl.arange(0, 4 * TILES)
    for q in tl.static_range(4):
        y = interleave(
            COLUMN(words, 4 * q, BITS, M1, M2, ASM),
            COLUMN(words, 4 * q + 1, BITS, M1, M2, ASM),
            COLUMN(words, 4 * q + 2, BITS, M1, M2, ASM),
            COLUMN(words, 4 * q + 3, BITS, M1, M2, ASM),
        )
        column = tl.program_id(1) * (16 * TILES) + (index // 4) * 16 + 4 * q + index % 4
        inside = known_row & (column < columns)[None, :]
        value = y.to(tl.float32) - OFFSET
        if scales_ptr is None:
            value *= gain
        elif GROUP_SIZE:
            place = row[:, None] * scale_groups + (column // GROUP_SIZE)[None, :]
            value *= gain * tl.load(scales_ptr + place, mask=inside, other=0.0).to(tl.float32)
        else:
            value *= gain * tl.load(scales_ptr + row, mask=row < last_row, other=0.0).to(tl.float32)[:, None]
        place = (row - first_row).to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(out_ptr + place, rounded(value, out_ptr.dtype.element_ty, ASM), mask=inside)
