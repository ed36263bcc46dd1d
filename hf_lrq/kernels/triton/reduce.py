# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""K2: sums partial results in a fixed order, adds L t, transforms, scales and casts. No atomics: runs are equal."""

import triton
import triton.language as tl

from hf_lrq.kernels.triton.activations import hadamard
from hf_lrq.kernels.triton.integer import rounded


@triton.jit
def _load_left(left_ptr, row, rank_index, mask, stride, NIBBLES: tl.constexpr):
    """Entries [row, rank_index] of L, float32 without their scale."""
    if NIBBLES:
        byte = tl.load(left_ptr + row * stride + rank_index // 2, mask=mask, other=0).to(tl.int32)
        value = ((byte >> (4 * (rank_index % 2))) & 15) - 8
    else:
        value = tl.load(left_ptr + row * stride + rank_index, mask=mask, other=0)
    return value.to(tl.float32)


@triton.jit
def reduce_kernel(
    partial_ptr, factor_partial_ptr, scales_ptr, left_ptr, left_scale_ptr, right_scale_ptr, rot_ptr, bias_ptr, y_ptr,
    splits, factor_splits, vectors_per_token, tokens, partial_rows, rows, ranks, rank, left_stride,
    end_0, end_1, end_2, gain,
    LOG_BLOCK: tl.constexpr, NIBBLES: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS rows, tokens).

    partial: [splits, tokens * vectors_per_token, partial_rows]; factor_partial: [factor_splits, tokens, ranks], in
    which each of up to four layers, which end at rows end_0, end_1, end_2 and `rows`, has `rank` of its own.
    """
    token = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    y = tl.zeros((ROWS,), tl.float32)
    for split in range(splits):
        for v in range(vectors_per_token):
            vector = (split * tokens + token) * vectors_per_token + v
            y += tl.load(partial_ptr + vector * partial_rows + row, mask=inside, other=0.0)
    if scales_ptr is not None:
        y *= tl.load(scales_ptr + row, mask=inside, other=0.0).to(tl.float32)
    y *= gain
    if left_ptr is not None:
        start_row = tl.program_id(0) * ROWS
        layer = (start_row >= end_0).to(tl.int32) + (start_row >= end_1).to(tl.int32)
        own = (layer + (start_row >= end_2).to(tl.int32)) * rank  # its first rank
        for start in range(0, rank, RANKS):
            index = start + tl.arange(0, RANKS)
            known = index < rank
            t = tl.zeros((RANKS,), tl.float32)
            for split in range(factor_splits):
                place = factor_partial_ptr + (split * tokens + token) * ranks + own + index
                t += tl.load(place, mask=known, other=0.0)
            if left_scale_ptr is not None:
                t *= tl.load(left_scale_ptr + own + index, mask=known, other=0.0).to(tl.float32)
            if right_scale_ptr is not None:
                t *= tl.load(right_scale_ptr + own + index, mask=known, other=0.0).to(tl.float32)
            mask = inside[:, None] & known[None, :]
            left = _load_left(left_ptr, row[:, None], index[None, :], mask, left_stride, NIBBLES)
            y += tl.sum(left * t[None, :], axis=1)
    if rot_ptr is not None:
        y = tl.reshape(hadamard(tl.reshape(y, (1, ROWS)), LOG_BLOCK), (ROWS,)) * tl.load(
            rot_ptr + row, mask=inside, other=0.0
        ).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * rows + row, rounded(y, y_ptr.dtype.element_ty, ASM), mask=inside)
