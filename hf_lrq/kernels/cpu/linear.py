"""A compressed layer as one call of the compiled library."""

import struct
from functools import cache

import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.scalar import Uniform
from hf_lrq.kernels.cpu import uniform
from hf_lrq.kernels.cpu.library import KINDS, Library
from hf_lrq.kernels.reference import hadamard
from hf_lrq.layout import hadamard_block
from hf_lrq.matrices import dense_factor

FAMILIES = {"bt": 0, "tcq": 1, "int": 2}
TRELLISES = ("bt2", "bt4", "tcq2", "tcq3", "tcq4")
UNIFORM = ("int2", "int3", "int4", "int8")
CODEBOOKS = (*TRELLISES, *UNIFORM)
# 8-bit digits that hold an activation with less error than its dtype has.
DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
# Columns for which sums of products fit into 32 bits: 2**31 / (128 * the largest y), by codebook.
MOST_COLUMNS = {"bt2": 65536, "bt4": 32768, "tcq2": 32768, "tcq3": 32768, "tcq4": 32768}

# Tokens from which matrix products of decoded rows are faster than integer sums, by tier, for bfloat16 and for others
# (4096 x 4096, bt2, one thread). avx512 is measured. amx is measured up to 512 tokens, where integer sums still win in
# every dtype; 768 is extrapolated. avx2, scalar and the number for tcq are estimates.
MANY_TOKENS = {"scalar": (8, 8), "avx2": (24, 32), "avx512": (64, 128), "amx": (768, 1 << 62)}
MANY_TOKENS_TCQ = 32  # at any tier above scalar

# Rows decoded at a time.
TILE_ROWS = 1024
SURELY_FEW = 8
ONE_GROUP = 1 << 30  # columns; a multiple of whatever a kernel takes at a time

_RECORD = struct.Struct("=34qd")  # `Call` of layer.c


@cache
def _format(codebook: str) -> tuple[int, int, int, int, float]:
    """Family, bits, multipliers and gain, as the library wants them."""
    book = get_codebook(codebook)
    if isinstance(book, Uniform):
        return FAMILIES[book.family], book.bits, 0, 0, book.step / 2
    first, *rest = book.multipliers  # type: ignore[attr-defined]
    return FAMILIES[book.family], book.bits, first, rest[0] if rest else 0, book.gain  # type: ignore[attr-defined]


def declines(
    x: Tensor, weight: Tensor, scales: Tensor, L: Tensor | None, R: Tensor | None, codebook: str, activation: str
) -> str | None:
    """Why the library does not take this call, None if it does."""
    if codebook not in CODEBOOKS:
        return f"no CPU kernel for codebook {codebook!r}"
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"x is on {x.device} and weight on {weight.device}, the kernels are for the CPU"
    if x.dtype not in DIGITS:
        return f"no CPU kernel for x of {x.dtype}"
    columns, rows = x.shape[-1], scales.shape[0]
    if columns > MOST_COLUMNS.get(codebook, columns):
        return f"{columns} columns are more than the {MOST_COLUMNS[codebook]} whose sums fit into 32 bits"
    if scales.ndim > 1 + get_codebook(codebook).grouped or scales.dtype not in DIGITS or weight.dtype != torch.uint8:
        return f"codes of {weight.dtype} with scales of {scales.dtype} {list(scales.shape)}"
    if weight.shape != get_codebook(codebook).packed_shape(rows, columns):
        return f"codes of shape {list(weight.shape)} do not belong to a [{rows}, {columns}] matrix"
    for factor in (L, R):
        if factor is not None and factor.dtype not in KINDS:
            return f"no CPU kernel for factors of {factor.dtype}"
    return None


def lrq_linear(
    library: Library,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    rot_in: Tensor | None,
    rot_out: Tensor | None,
    L: Tensor | None,
    R: Tensor | None,
    L_scale: Tensor | None,
    R_scale: Tensor | None,
    bias: Tensor | None,
    codebook: str,
    group_size: int,
    block: int,
    activation: str,
) -> Tensor:
    """`reference.lrq_linear` by the library, for a call that `declines` has nothing against."""
    columns, rows = x.shape[-1], scales.shape[0]
    tokens = x.reshape(-1, columns)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    y = new_output(x, rows)
    if y.numel() == 0:
        return y
    rank = 0
    if L is not None and R is not None:
        rank = L.shape[1] if L_scale is None else L_scale.shape[0]
        _expect(L, rows, (rank + 1) // 2 if L.dtype == torch.uint8 else rank)
        _expect(R, (rank + 1) // 2 if R.dtype == torch.uint8 else rank, columns)
    groups = 1 if scales.ndim == 1 else -(-columns // group_size)
    _expect(scales, *(rows, groups)[: scales.ndim])
    many = tokens.shape[0] >= SURELY_FEW and tokens.shape[0] >= many_tokens(library, codebook, x.dtype)
    if many:
        factors = (L, R, L_scale, R_scale)
        return by_matrix_products(
            library, tokens, weight, scales, rot_in, rot_out, factors, bias, codebook, group_size, block
        ).view(y.shape)
    # Copies of what is not contiguous have to live until the call returns.
    held = [_readable(t) for t in (weight, scales, rot_in, rot_out, L, L_scale, R, R_scale, bias)]
    weight_at, scales_at, rot_in_at, rot_out_at, L_at, L_scale_at, R_at, R_scale_at, bias_at = map(_place, held)
    for vector, size in ((rot_in, columns), (rot_out, rows), (bias, rows), (L_scale, rank), (R_scale, rank)):
        if vector is not None:
            _expect(vector, size)
    family, bits, first, second, gain = _format(codebook)
    if codebook in UNIFORM:
        first, second = group_size if groups > 1 else ONE_GROUP, groups
    blocked = activation == "int8"
    record = _RECORD.pack(
        *(tokens.data_ptr(), tokens.stride(0), KINDS[x.dtype], y.data_ptr()),
        *(tokens.shape[0], columns, rows),
        *(weight_at[0], family, bits, first, second),
        *scales_at,
        *(*rot_in_at, hadamard_block(columns, block), *rot_out_at, hadamard_block(rows, block)),
        *(*L_at, *L_scale_at, *R_at, *R_scale_at, rank),
        *bias_at,
        *(1 if blocked else DIGITS[x.dtype], blocked),
        _useful_threads(tokens.shape[0] * columns * rows),
        gain,
    )
    if library.linear(record):
        raise MemoryError(f"no memory for a compressed layer of [{rows}, {columns}] and {tokens.shape[0]} tokens.")
    return y


def many_tokens(library: Library, codebook: str, dtype: torch.dtype) -> int:
    """Tokens from which `by_matrix_products` is faster."""
    found = MANY_TOKENS[library.tier_name][dtype != torch.bfloat16]
    return min(found, MANY_TOKENS_TCQ) if codebook.startswith("tcq") else found


@torch.no_grad()
def by_matrix_products(
    library: Library,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    rot_in: Tensor | None,
    rot_out: Tensor | None,
    factors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
    codebook: str,
    group_size: int,
    block: int,
) -> Tensor:
    """The layer for many tokens [n, in]: rows of Q, some at a time, are decoded to the dtype of x and multiplied."""
    dtype, columns, rows = x.dtype, x.shape[1], scales.shape[0]
    z = x if rot_in is None else hadamard(x * rot_in.to(dtype), block)
    y = x.new_empty(x.shape[0], rows)
    tile = torch.empty(min(TILE_ROWS, rows), columns, dtype=dtype)
    gain = _format(codebook)[4]
    # In bfloat16 the integers of bt2 are exact, their multiples are not; in float16 sums without scales may overflow.
    after = dtype == torch.bfloat16
    for start in range(0, rows, TILE_ROWS):
        stop = min(start + TILE_ROWS, rows)
        if codebook in UNIFORM:
            threads = _useful_threads(16 * columns * (stop - start))
            parts = (weight, codebook, columns, start, stop, dtype, threads, scales, group_size, tile)
            y[:, start:stop] = z @ uniform.decode(library, *parts).T
            continue
        Q = decode(library, weight, codebook, columns, start, stop, dtype, 1.0 if after else gain, tile)
        if after:
            y[:, start:stop] = (z @ Q.T) * (scales[start:stop].float() * gain).to(dtype)
        else:
            y[:, start:stop] = z @ Q.mul_(scales[start:stop, None]).T
    L, R, L_scale, R_scale = factors
    if L is not None and R is not None:
        y += (z @ dense_factor(R, R_scale, 0).to(dtype).T) @ dense_factor(L, L_scale, 1).to(dtype).T
    if rot_out is not None:
        y = hadamard(y, block) * rot_out.to(dtype)
    return y if bias is None else y + bias.to(dtype)


def decode_rows(
    library: Library, weight: Tensor, codebook: str, in_features: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor | None:
    """Values of rows [start, stop) before scales, [stop - start, in]; None where there is no kernel for it."""
    if codebook not in CODEBOOKS or dtype not in DIGITS or weight.device.type != "cpu":
        return None
    if codebook in UNIFORM:
        threads = _useful_threads(16 * in_features * (stop - start))
        return uniform.decode(library, weight, codebook, in_features, start, stop, dtype, threads)
    return decode(library, weight, codebook, in_features, start, stop, dtype, _format(codebook)[4])


def decode(
    library: Library,
    weight: Tensor,
    codebook: str,
    in_features: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
    gain: float,
    out: Tensor | None = None,
) -> Tensor:
    """Integers of the trellis times `gain`, rounded once to `dtype`: [stop - start, in]; in `out` if given."""
    book = get_codebook(codebook)
    blocks, row_block, count = weight.contiguous(), book.row_block, stop - start
    if weight.dtype != torch.uint8 or weight.shape != book.packed_shape(len(weight) * row_block, in_features):
        raise ValueError(
            f"codes of codebook {codebook!r} with {in_features} columns are torch.uint8 "
            f"{['blocks', *book.packed_shape(row_block, in_features)[1:]]}, got {weight.dtype} {list(weight.shape)}."
        )
    if start % row_block or not 0 <= start <= stop <= len(weight) * row_block:
        raise ValueError(
            f"rows {start} to {stop} are not in codes of {len(weight) * row_block} rows; the first row must be a "
            f"multiple of {row_block}."
        )
    values = torch.empty(count, in_features, dtype=dtype) if out is None else out[:count]
    family, bits, first, second, _ = _format(codebook)
    if values.numel():
        library.decode(
            *(blocks[start // row_block].data_ptr(), values.data_ptr(), count, in_features, KINDS[dtype]),
            *(family, bits, first, second, _useful_threads(16 * values.numel()), gain),
        )
    return values


def new_output(x: Tensor, rows: int) -> Tensor:
    """Uninitialised [..., rows] for x [..., in]."""
    return x.new_empty(*x.shape[:-1], rows)


def _place(tensor: Tensor | None) -> tuple[int, int]:
    """Address and kind; 0 where there is no tensor."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), KINDS[tensor.dtype])


def _readable(tensor: Tensor | None) -> Tensor | None:
    """The tensor as the library can read it."""
    if tensor is None:
        return None
    if tensor.device.type != "cpu":
        raise ValueError(
            f"a tensor of the layer is on {tensor.device}, its codes are on the CPU. Move the whole layer."
        )
    return (tensor if tensor.dtype in KINDS else tensor.float()).contiguous()


def _expect(tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} stands where the layer needs {list(shape)}.")


def _useful_threads(products: int) -> int:
    """As many as torch may use, but no more than have a tenth of a millisecond of work."""
    return min(torch.get_num_threads(), 1 + (products >> 22))
