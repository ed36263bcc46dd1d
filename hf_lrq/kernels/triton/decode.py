# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""What the codes of a codebook mean, a tile of 16 columns of a row at a time.

A codebook is three functions of the same shape, which kernels take as compile-time arguments:

    load(weight, row [n], tile [m], T, inside [n, m], row_tiles, tiles_left, ...) -> words, a tuple of [n, m] uint32
    products(words, QUAD, ...) -> a tuple of [n, m] uint32; each holds four unsigned bytes
    column(words, COLUMN, ...) -> [n, m] int32, an integer for one of the 16 columns

`load` reads tiles T + tile of the rows, counted from the tile that `weight` points at; `row_tiles` is the second size
of the stored codes, `tiles_left` what is left of it from there, and `inside` is None where all rows and tiles exist.

With x spread over bytes as `activations` does for the codebook, and `offset` that of its `Decoder`,
sum over columns of Y x = sum over quads and products of dot4(product, spread x) - offset * sum of x, and
Y = column - offset.
"""

import triton
import triton.language as tl

from hf_lrq.kernels.triton.integer import byte_sum, pair_twice


@triton.jit
def _load_word(pointer, inside):
    """uint32; zero where not inside, which is None where all are."""
    word = tl.load(pointer) if inside is None else tl.load(pointer, mask=inside, other=0)
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def _lane_words(weight_ptr, row, word, tile, T: tl.constexpr, inside, row_tiles, BITS: tl.constexpr):
    """Word `word` [n] of the lanes of rows. A tile of 128 rows by 16 columns is [4 * BITS][16 lanes] words."""
    size: tl.constexpr = 64 * BITS
    place = (row // 128) * (row_tiles * size) + word * 16 + row % 16
    # T last: loads of one thread then differ by constants, which are part of the instruction.
    return _load_word(weight_ptr + place[:, None] + (tile * size)[None, :] + T * size, inside)


@triton.jit
def load_trellis(
    weight_ptr, row, tile, T: tl.constexpr, inside, row_tiles, tiles_left, BITS: tl.constexpr, ALIGNED: tl.constexpr
):
    """The word before the row's in the circular stream of its lane, then its own BITS / 2 words."""
    words: tl.constexpr = BITS // 2
    first = (row % 128) // 16 * words
    before = (first + 8 * words - 1) % (8 * words)
    result = (_lane_words(weight_ptr, row, before, tile, T, inside, row_tiles, BITS),)
    for i in tl.static_range(words):
        word = _lane_words(weight_ptr, row, first + i, tile, T, inside, row_tiles, BITS)
        result += (word,)  # type: ignore[assignment]
    return result


@triton.jit
def load_trellis_3bit(
    weight_ptr, row, tile, T: tl.constexpr, inside, row_tiles, tiles_left, BITS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Two words: the 16 bits before the row's 48 in the circular stream of 12 words, then those 48."""
    p = (row % 128) // 16
    first = (3 * p + 23) % 24 // 2  # of the word that holds half-word 3 p - 1
    shift = ((1 - p % 2) * 16).to(tl.uint32)[:, None]
    w0 = _lane_words(weight_ptr, row, first, tile, T, inside, row_tiles, BITS)
    w1 = _lane_words(weight_ptr, row, (first + 1) % 12, tile, T, inside, row_tiles, BITS)
    w2 = _lane_words(weight_ptr, row, (first + 2) % 12, tile, T, inside, row_tiles, BITS)
    # Two steps: a shift by 32 is undefined.
    return (w0 >> shift) | ((w1 << 1) << (31 - shift)), (w1 >> shift) | ((w2 << 1) << (31 - shift))


@triton.jit
def load_fields(
    weight_ptr, row, tile, T: tl.constexpr, inside, row_tiles, tiles_left, BITS: tl.constexpr, ALIGNED: tl.constexpr
):
    """BITS / 2 words of a row-major matrix with `row_tiles` tiles of 8 columns a row; zero beyond the row."""
    words: tl.constexpr = BITS // 2
    result = ()
    for i in tl.static_range(words):
        word = (T + tile[None, :]) * words + i
        if ALIGNED:
            known = None if inside is None else inside & (word < tiles_left * BITS // 4)
            start = weight_ptr + (row * (row_tiles * BITS // 4))[:, None] + (tile * words)[None, :]
            value = _load_word(start + (T * words + i), known)
        else:
            value = tl.zeros((row.shape[0], tile.shape[0]), tl.uint32)
            for k in tl.static_range(4):
                place = weight_ptr.to(tl.pointer_type(tl.uint8)) + row[:, None] * (row_tiles * BITS) + 4 * word + k
                known = 4 * word + k < tiles_left * BITS
                known = known if inside is None else inside & known
                value |= tl.load(place, mask=known, other=0).to(tl.uint32) << (8 * k)
        result += (value,)  # type: ignore[assignment]
    return result


@triton.jit
def byte_trellis_products(
    words, QUAD: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, ASM: tl.constexpr
):
    """Of stream byte QUAD of the row: the bytes of both products."""
    new: tl.constexpr = QUAD % 4
    old: tl.constexpr = 7 if new == 0 else new - 1
    word = words[1 + QUAD // 4]
    before = words[QUAD // 4]
    return pair_twice(word, before, new, old, ASM) * M1, pair_twice(word, before, old, new, ASM) * M2


@triton.jit
def byte_trellis_column(
    words, COLUMN: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, ASM: tl.constexpr
):
    """2 bits: the sum of byte COLUMN % 4 of both products. 4 bits: a signed sum of all four byte sums."""
    per_byte: tl.constexpr = 8 // BITS
    pair = byte_trellis_products(words, COLUMN // per_byte, BITS, M1, M2, ASM)
    if BITS == 2:
        shift: tl.constexpr = 8 * (COLUMN % 4)
        value = (((pair[0] >> shift) & 255) + ((pair[1] >> shift) & 255)).to(tl.int32)
    else:
        s0 = ((pair[0] & 255) + (pair[1] & 255)).to(tl.int32)
        s1 = (((pair[0] >> 8) & 255) + ((pair[1] >> 8) & 255)).to(tl.int32)
        s2 = (((pair[0] >> 16) & 255) + ((pair[1] >> 16) & 255)).to(tl.int32)
        s3 = ((pair[0] >> 24) + (pair[1] >> 24)).to(tl.int32)
        value = (s0 - s3) + (s2 - s1) if COLUMN % 2 == 0 else (s0 - s3) + (s1 - s2)
    return value


@triton.jit
def bit_trellis_products(
    words, QUAD: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, ASM: tl.constexpr
):
    """Of column QUAD: the product of the 16 bits of the stream that end with the column's."""
    # The words of `load_trellis` begin 32 bits before the row, those of `load_trellis_3bit` 16.
    begin: tl.constexpr = (0 if BITS == 3 else 16) + BITS * (QUAD + 1)
    shift: tl.constexpr = begin % 32
    window = words[begin // 32] >> shift
    if shift > 16:
        window |= words[begin // 32 + 1] << (32 - shift)
    return ((window & 0xFFFF) * M1,)


@triton.jit
def bit_trellis_column(
    words, COLUMN: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, ASM: tl.constexpr
):
    """The sum of the bytes of the product."""
    return byte_sum(bit_trellis_products(words, COLUMN, BITS, M1, M2, ASM)[0], ASM)


@triton.jit
def field_products(
    words, QUAD: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, ASM: tl.constexpr
):
    """Field QUAD % (8 / BITS) of each byte of word QUAD / (8 / BITS)."""
    fields: tl.constexpr = 8 // BITS
    mask: tl.constexpr = (2**BITS - 1) * 0x01010101
    return ((words[QUAD // fields] >> (BITS * (QUAD % fields))) & mask,)


@triton.jit
def field_column(
    words, COLUMN: tl.constexpr, BITS: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr, ASM: tl.constexpr
):
    """The code."""
    word: tl.constexpr = COLUMN * BITS // 32
    return ((words[word] >> (COLUMN * BITS % 32)) & (2**BITS - 1)).to(tl.int32)
