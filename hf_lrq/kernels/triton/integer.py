# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Integer arithmetic on packed bytes. Functions have a portable form, which the interpreter runs, and a form in PTX.

No inline assembly here uses pack > 1: the compiler moves such assembly across a broadcast and gets other bytes.
"""

import triton
import triton.language as tl


@triton.jit
def pair_twice(low, high, FIRST: tl.constexpr, SECOND: tl.constexpr, ASM: tl.constexpr):
    """Two bytes of (low, high), bytes 0-3 and 4-7: FIRST, SECOND, FIRST, SECOND. uint32."""
    if ASM:
        selector: tl.constexpr = (FIRST | (SECOND << 4)) * 0x0101
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        even = ((low if FIRST < 4 else high) >> (8 * (FIRST % 4))) & 255
        odd = ((low if SECOND < 4 else high) >> (8 * (SECOND % 4))) & 255
        result = (even | (odd << 8)) * 0x10001
    return result


@triton.jit
def dot4(unsigned, signed, sum, ASM: tl.constexpr):
    """sum + the dot product of four unsigned bytes (in uint32) and four signed bytes (in int32). int32."""
    if ASM:
        sum = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [unsigned, signed, sum], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            sum += ((unsigned >> (8 * i)) & 255).to(tl.int32) * ((signed << (24 - 8 * i)) >> 24)
    return sum


@triton.jit
def byte_sum(word, ASM: tl.constexpr):
    """The sum of four unsigned bytes. int32."""
    ones = tl.full(word.shape, 0x01010101, tl.int32)
    return dot4(word, ones, tl.zeros(word.shape, tl.int32), ASM)


@triton.jit
def interleave(a, b, c, d):
    """[rows, n] four times -> [rows, 4 n]: a[0], b[0], c[0], d[0], a[1], ..."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4 * a.shape[1]))


@triton.jit
def signed_bytes(word):
    """The four bytes of each word, read as signed, in order. [rows, n] uint32 -> [rows, 4 n] int8."""
    return interleave(
        (word & 255).to(tl.uint8).to(tl.int8, bitcast=True),
        ((word >> 8) & 255).to(tl.uint8).to(tl.int8, bitcast=True),
        ((word >> 16) & 255).to(tl.uint8).to(tl.int8, bitcast=True),
        (word >> 24).to(tl.uint8).to(tl.int8, bitcast=True),
    )


@triton.jit
def replaced(values, INDEX: tl.constexpr, value):
    """The tuple `values` with another value at INDEX."""
    return values[:INDEX] + (value,) + values[INDEX + 1 :]  # noqa: RUF005 (no stars in kernels)


@triton.jit
def rounded(value, dtype: tl.constexpr, ASM: tl.constexpr):
    """float32 -> dtype, to nearest. The interpreter's own cast to bfloat16 does not round to nearest."""
    if dtype == tl.bfloat16 and not ASM:
        bits = value.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(finite, nearest, value)
    return value.to(dtype)
