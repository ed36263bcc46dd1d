# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Activations: sign flips, block Hadamard transform and rounding to signed base-256 digits, 256 columns at a time.

A token becomes DIGITS rows of bytes: z = scale * sum over d of 256^d digit_d up to half a step, with one scale per 256
columns, digits in [-128, 127] and the last in [-127, 127]. One digit rounds to 8 bits, two to 16, three to 24.
The bytes lie in the order that the products of the codebook want (`spread_...`).
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(256)


@triton.jit
def hadamard(x, LOG_BLOCK: tl.constexpr):
    """Orthonormal Walsh-Hadamard transform of each 2**LOG_BLOCK values in a row. x: [m, n] float32."""
    block: tl.constexpr = 2**LOG_BLOCK
    blocks: tl.constexpr = x.shape[0] * x.shape[1] // block
    shape: tl.constexpr = x.shape
    # A round pairs neighbours and moves the index bit it has used to the front of the block: after LOG_BLOCK
    # rounds every bit is back in its place.
    for _ in tl.static_range(LOG_BLOCK):
        even, odd = tl.split(tl.reshape(x, (blocks, block // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), shape)
    return x * (block**-0.5)


@triton.jit
def digit(value, D: tl.constexpr):
    """Digit D of an int32, balanced base 256. int8."""
    bias: tl.constexpr = 128 * (256 ** (D + 1) - 1) // 255
    return ((((value + bias) >> (8 * D)) & 255) - 128).to(tl.int8)


@triton.jit
def _place(column, BYTES: tl.constexpr, tile_stride, quad_stride):
    """Where the first of BYTES bytes of a column goes; strides in words of four bytes."""
    position = (column % 16) * BYTES
    return (column // 16) * (4 * tile_stride) + (position // 4) * (4 * quad_stride) + position % 4


@triton.jit
def spread_fields(out_ptr, value, known, D: tl.constexpr, BITS: tl.constexpr, tile_stride, quad_stride):
    """For fields of bytes: byte b of the word of field f is column (8 / BITS) b + f. Plain order at 8 bits."""
    fields: tl.constexpr = 8 // BITS
    column = tl.arange(0, GROUP)
    inner = column % (4 * fields)
    moved = column - inner + (inner % fields) * 4 + inner // fields
    tl.store(out_ptr + _place(moved, 1, tile_stride, quad_stride)[None, :], digit(value, D), mask=known)


@triton.jit
def spread_plain(out_ptr, value, known, D: tl.constexpr, BITS: tl.constexpr, tile_stride, quad_stride):
    """One byte per column, in order."""
    place = _place(tl.arange(0, GROUP), 1, tile_stride, quad_stride)
    tl.store(out_ptr + place[None, :], digit(value, D), mask=known)


@triton.jit
def spread_pairs(out_ptr, value, known, D: tl.constexpr, BITS: tl.constexpr, tile_stride, quad_stride):
    """Of columns (a, b): a, b, -b, -a. Sums of pairs of weights over these give a signed sum of four bytes."""
    a, b = tl.split(tl.reshape(value, (value.shape[0], GROUP // 2, 2)))
    place = out_ptr + _place(2 * tl.arange(0, GROUP // 2), 2, tile_stride, quad_stride)[None, :]
    tl.store(place, digit(a, D), mask=known)
    tl.store(place + 1, digit(b, D), mask=known)
    tl.store(place + 2, digit(-b, D), mask=known)
    tl.store(place + 3, digit(-a, D), mask=known)


@triton.jit
def spread_copies(out_ptr, value, known, D: tl.constexpr, BITS: tl.constexpr, tile_stride, quad_stride):
    """Each column four times."""
    word = (digit(value, D).to(tl.int32) & 255) * 0x01010101
    place = _place(tl.arange(0, GROUP), 4, tile_stride, quad_stride) // 4
    tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + place[None, :], word, mask=known)


@triton.jit
def mix_none(z):
    """The columns themselves."""
    return z


@triton.jit
def mix_pairs(z):
    """Columns (a, b) -> (a + b, b - a): the sum over both of Y z, with Y the signed sums of a 4-bit byte trellis, is
    (a + b)(S0 - S3) + (b - a)(S1 - S2)."""
    a, b = tl.split(tl.reshape(z, (z.shape[0], GROUP // 2, 2)))
    return tl.reshape(tl.join(a + b, b - a), (z.shape[0], GROUP))


@triton.jit
def prepare(
    x_ptr, rot_ptr, z_ptr, byte_ptr, scale_ptr, sum_ptr, token, first, last, groups, columns, x_stride, tile_stride,
    quad_stride,
    LOG_BLOCK: tl.constexpr, DIGITS: tl.constexpr, EXPAND: tl.constexpr, BITS: tl.constexpr, MIX: tl.constexpr,
    SPREAD: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """z = H(rot * x), its digits, their scale and the sum of the digits in each 16 columns.

    Of one token and the groups of 256 columns from first to min(last, first + GROUPS).
    """
    group = first + tl.arange(0, GROUPS)
    known = (group < last)[:, None]
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = known & (column < columns)
    z = tl.load(x_ptr + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if rot_ptr is not None:
        z = hadamard(z * tl.load(rot_ptr + column, mask=inside, other=0.0).to(tl.float32), LOG_BLOCK)
    tl.store(z_ptr + token * (groups * GROUP) + column, z, mask=known)
    mixed = MIX(z)
    largest: tl.constexpr = 127 * 256 ** (DIGITS - 1)
    peak = tl.maximum(tl.max(tl.abs(mixed), axis=1), 1e-30)
    # A NaN or an infinity anywhere must reach the result; maxima drop NaN.
    step = peak / largest + tl.sum(mixed * 0.0, axis=1)
    value = tl.floor(mixed * (largest / peak)[:, None] + 0.5).to(tl.int32)
    for d in tl.static_range(DIGITS):
        row = token * DIGITS + d
        start = byte_ptr + row * (groups * GROUP * EXPAND) + group[:, None] * (64 * tile_stride)
        SPREAD(start, value, known, d, BITS, tile_stride, quad_stride)
        tl.store(scale_ptr + row * groups + group, step * 256.0**d, mask=group < last)
        sums = tl.sum(tl.reshape(digit(value, d).to(tl.float32), (GROUPS, 16, 16)), axis=2)
        place = (row * groups + group)[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(sum_ptr + place, sums, mask=known)


@triton.jit
def prepare_kernel(
    x_ptr, rot_ptr, z_ptr, byte_ptr, scale_ptr, sum_ptr, groups, columns, x_stride, tile_stride, quad_stride,
    LOG_BLOCK: tl.constexpr, DIGITS: tl.constexpr, EXPAND: tl.constexpr, BITS: tl.constexpr, MIX: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """Grid (groups, tokens)."""
    prepare(
        x_ptr, rot_ptr, z_ptr, byte_ptr, scale_ptr, sum_ptr, tl.program_id(1), tl.program_id(0), groups, groups,
        columns, x_stride, tile_stride, quad_stride, LOG_BLOCK, DIGITS, EXPAND, BITS, MIX, SPREAD, 1,
    )  # fmt: skip
