"""Compressed layers as one call of the compiled library."""

import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.scalar import Uniform
from hf_lrq.kernels.cpu import uniform
from hf_lrq.kernels.cpu.library import KINDS, Library
from hf_lrq.kernels.operands import Operands
from hf_lrq.kernels.reference import hadamard
from hf_lrq.layout import hadamard_block
from hf_lrq.matrices import dense_factor

FAMILIES = {"bt": 0, "tcq": 1, "int": 2}
TRELLISES = ("bt2", "bt4", "tcq2", "tcq3", "tcq4")
UNIFORM = ("int2", "int3", "int4", "int6", "int8")
CODEBOOKS = (*TRELLISES, *UNIFORM)
# 8-bit digits that hold an activation with less error than its dtype has.
DIGITS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}
# Columns for which sums of products fit into 32 bits: 2**31 / (128 * the largest y), by codebook.
MOST_COLUMNS = {"bt2": 65536, "bt4": 32768, "tcq2": 32768, "tcq3": 32768, "tcq4": 32768}

# Tokens from which matrix products of decoded rows are faster than integer sums, by tier and family, for inputs of
# bfloat16, float16 and float32. Measured on 4096 x 4096 (bt2, tcq3, int4 and int8; one thread), torch held to the same
# instructions as the library; at scalar, float16 is a guess for processors whose torch has kernels for it.
NEVER = 1 << 62
MANY_TOKENS = {
    "scalar": {"bt": (12, 12, 4), "tcq": (16, 16, 4), "int": (32, 32, 8)},
    "avx2": {"bt": (NEVER, NEVER, 44), "tcq": (NEVER, NEVER, 64), "int": (NEVER, NEVER, 28)},
    "avx512": {"bt": (NEVER, NEVER, 144), "tcq": (64, NEVER, 38), "int": (192, NEVER, 48)},
    "amx": {"bt": (768, NEVER, NEVER), "tcq": (34, 48, 34), "int": (384, NEVER, NEVER)},
}
ORDER = (torch.bfloat16, torch.float16, torch.float32)

# Rows decoded at a time.
TILE_ROWS = 1024
SURELY_FEW = 4
CODES_NDIM = 3  # axes of the codes of one matrix, see `Codebook.packed_shape`; a stack has one more
ONE_GROUP = 1 << 30  # columns; a multiple of whatever a kernel takes at a time

# The two halves of `Call` of layer.c.
_RUN, _LAYER = struct.Struct("=9q"), struct.Struct("=25qd")


@cache
def _format(codebook: str) -> tuple[int, int, int, int, float]:
    """Family, bits, multipliers and gain, as the library wants them."""
    book = get_codebook(codebook)
    if isinstance(book, Uniform):
        return FAMILIES[book.family], book.bits, 0, 0, book.step / 2
    first, *rest = book.multipliers  # type: ignore[attr-defined]
    return FAMILIES[book.family], book.bits, first, rest[0] if rest else 0, book.gain  # type: ignore[attr-defined]


def declines(x: Tensor, layer: Operands, activation: str) -> str | None:
    """Why the library does not take this call, None if it does."""
    weight, scales = layer.weight, layer.scales
    if not (x.is_cpu and weight.is_cpu):
        return f"x is on {x.device} and weight on {weight.device}, the kernels are for the CPU"
    factors = tuple(factor.dtype for factor in (layer.L, layer.R) if factor is not None)
    return _declines(
        layer.codebook, x.dtype, x.shape[-1], weight.dtype, weight.shape, scales.dtype, scales.shape, factors
    )


@lru_cache(maxsize=1024)
def _declines(
    codebook: str,
    dtype: torch.dtype,
    columns: int,
    weight_dtype: torch.dtype,
    weight_shape: torch.Size,
    scales_dtype: torch.dtype,
    scales_shape: torch.Size,
    factor_dtypes: tuple[torch.dtype, ...],
) -> str | None:
    if codebook not in CODEBOOKS:
        return f"no CPU kernel for codebook {codebook!r}"
    if dtype not in DIGITS:
        return f"no CPU kernel for x of {dtype}"
    if columns > MOST_COLUMNS.get(codebook, columns):
        return f"{columns} columns are more than the {MOST_COLUMNS[codebook]} whose sums fit into 32 bits"
    grouped = get_codebook(codebook).grouped
    if len(scales_shape) > 1 + grouped or scales_dtype not in DIGITS or weight_dtype != torch.uint8:
        return f"codes of {weight_dtype} with scales of {scales_dtype} {list(scales_shape)}"
    rows = scales_shape[0]
    if weight_shape != get_codebook(codebook).packed_shape(rows, columns):
        return f"codes of shape {list(weight_shape)} do not belong to a [{rows}, {columns}] matrix"
    for factor_dtype in factor_dtypes:
        if factor_dtype not in KINDS:
            return f"no CPU kernel for factors of {factor_dtype}"
    return None


def lrq_linear_group(library: Library, x: Tensor, layers: Sequence[Operands], activation: str) -> list[Tensor]:
    """`dispatch.lrq_linear_group` by the library, for layers that `declines` has nothing against."""
    tokens = _in_rows(x)
    prepared = [_prepared(layer, x.shape[-1])[0] for layer in layers]
    if len(tokens) >= SURELY_FEW and len(tokens) >= many_tokens(library, layers[0].codebook, x.dtype):
        z = _rotated(tokens, layers[0].rot_in, layers[0].block)
        return [by_matrix_products(library, z, layer).view(*x.shape[:-1], -1) for layer in layers]
    outputs = [new_output(x, each.rows) for each in prepared]
    _by_integer_sums(library, tokens, prepared, outputs, activation)
    return outputs


def lrq_linear_experts(
    library: Library, x: Tensor, counts: Sequence[int], stacks: Sequence[Operands], activation: str
) -> list[Tensor]:
    """`dispatch.lrq_linear_experts` by the library, under the conditions of `lrq_linear_group`."""
    tokens, many = _in_rows(x), max(SURELY_FEW, many_tokens(library, stacks[0].codebook, x.dtype))
    prepared = [_prepared(stack, x.shape[-1]) for stack in stacks]
    outputs = [x.new_zeros(len(x), each[0].rows) for each in prepared]
    start = 0
    for expert, count in enumerate(counts):
        own = slice(start, start + count)
        start += count
        if count >= many:
            layers = [stack.layer(expert) for stack in stacks]
            z = _rotated(tokens[own], layers[0].rot_in, layers[0].block)
            for y, layer in zip(outputs, layers, strict=True):
                y[own] = by_matrix_products(library, z, layer)
        elif count:
            of_expert = [each[expert] for each in prepared]
            _by_integer_sums(library, tokens[own], of_expert, [y[own] for y in outputs], activation)
    return outputs


def _in_rows(x: Tensor) -> Tensor:
    """[..., in] -> [tokens, in], each in one piece."""
    tokens = x.reshape(-1, x.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def _by_integer_sums(
    library: Library, tokens: Tensor, layers: Sequence["_Prepared"], outputs: Sequence[Tensor], activation: str
) -> None:
    """Fill the outputs of layers of one input, in one call."""
    count, columns = tokens.shape
    rows = sum(each.rows for each in layers)
    if count * rows == 0:
        return
    blocked = activation == "int8"
    digits = 1 if blocked else DIGITS[tokens.dtype]
    given = (tokens.data_ptr(), tokens.stride(0), KINDS[tokens.dtype])
    how = (count, columns, digits, blocked, _useful_threads(count * columns * rows))
    records = [_RUN.pack(*given, y.data_ptr(), *how) + each.record for y, each in zip(outputs, layers, strict=True)]
    if library.linear(b"".join(records), len(records)):
        raise MemoryError(f"no memory for a compressed layer of [{rows}, {columns}] and {count} tokens.")


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A layer as the library takes it.

    Attributes:
        record: the part of `Call` that is the layer's.
        rows: number of rows of the layer.
        copies: tensors that the record points to and nobody else holds.
    """

    record: bytes
    rows: int
    copies: tuple[Tensor, ...] = ()


# Codes, columns and axes -> all that records depend on, and the records. To describe a small layer takes longer than to
# compute it.
_known: dict[tuple[int, int, int], tuple[Hashable, list[_Prepared]]] = {}
_MOST_KNOWN = 1 << 14


def _prepared(layer: Operands, columns: int) -> list[_Prepared]:
    """The layer, or each of a stack."""
    weight, tensors = layer.weight, layer.tensors
    key = (
        *(layer.codebook, layer.group_size, layer.block),
        *[None if t is None else (t.data_ptr(), t.dtype, t.shape, t.is_cpu and t.is_contiguous()) for t in tensors],
    )
    place = weight.data_ptr(), columns, weight.ndim
    found = _known.get(place)
    if found is not None and found[0] == key:
        return found[1]
    layers = [layer] if weight.ndim == CODES_NDIM else [layer.layer(index) for index in range(len(weight))]
    prepared = [_prepare(one, columns) for one in layers]
    if not any(one.copies for one in prepared):
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[place] = key, prepared
    return prepared


def _prepare(layer: Operands, columns: int) -> _Prepared:
    """A layer as the library takes it, after checking everything that the library does not check itself."""
    rows, rank = layer.out_features, 0
    if layer.L is not None and layer.R is not None:
        rank = layer.rank
        _expect(layer.L, rows, (rank + 1) // 2 if layer.L.dtype == torch.uint8 else rank)
        _expect(layer.R, (rank + 1) // 2 if layer.R.dtype == torch.uint8 else rank, columns)
    groups = 1 if layer.scales.ndim == 1 else -(-columns // layer.group_size)
    _expect(layer.scales, *(rows, groups)[: layer.scales.ndim])
    sizes = {"rot_in": columns, "rot_out": rows, "bias": rows, "L_scale": rank, "R_scale": rank}
    for name, size in sizes.items():
        if (vector := getattr(layer, name)) is not None:
            _expect(vector, size)
    readable = [_readable(tensor) for tensor in layer.tensors]
    weight, scales, rot_in, rot_out, L, R, L_scale, R_scale, bias = map(_place, readable)
    family, bits, first, second, gain = _format(layer.codebook)
    if layer.codebook in UNIFORM:
        first, second = layer.group_size if groups > 1 else ONE_GROUP, groups
    record = _LAYER.pack(
        *(rows, weight[0], family, bits, first, second),
        *scales,
        *(*rot_in, hadamard_block(columns, layer.block), *rot_out, hadamard_block(rows, layer.block)),
        *(*L, *L_scale, *R, *R_scale, rank),
        *bias,
        gain,
    )
    copies = [own for own, given in zip(readable, layer.tensors, strict=True) if own is not None and own is not given]
    return _Prepared(record, rows, tuple(copies))


def many_tokens(library: Library, codebook: str, dtype: torch.dtype) -> int:
    """Number of tokens from which `by_matrix_products` is faster."""
    return MANY_TOKENS[library.tier_name][get_codebook(codebook).family][ORDER.index(dtype)]


def _rotated(x: Tensor, rot_in: Tensor | None, block: int) -> Tensor:
    return x if rot_in is None else hadamard(x * rot_in.to(x.dtype), block)


@torch.no_grad()
def by_matrix_products(library: Library, z: Tensor, layer: Operands) -> Tensor:
    """The layer for many transformed tokens [n, in]: rows of Q, some at a time, are decoded to their dtype."""
    dtype, columns, rows, scales = z.dtype, z.shape[1], layer.out_features, layer.scales
    y = z.new_empty(z.shape[0], rows)
    tile = torch.empty(min(TILE_ROWS, rows), columns, dtype=dtype)
    gain = _format(layer.codebook)[4]
    # In bfloat16 the integers of bt2 are exact, their multiples are not; in float16 sums without scales may overflow.
    after = dtype == torch.bfloat16
    for start in range(0, rows, TILE_ROWS):
        stop = min(start + TILE_ROWS, rows)
        if layer.codebook in UNIFORM:
            threads = _useful_threads(16 * columns * (stop - start))
            scaled = (scales, layer.group_size, tile)
            Q = uniform.decode(library, layer.weight, layer.codebook, columns, start, stop, dtype, threads, *scaled)
            y[:, start:stop] = z @ Q.T
            continue
        factor = 1.0 if after else gain
        Q = decode(library, layer.weight, layer.codebook, columns, start, stop, dtype, factor, tile)
        if after:
            y[:, start:stop] = (z @ Q.T) * (scales[start:stop].float() * gain).to(dtype)
        else:
            y[:, start:stop] = z @ Q.mul_(scales[start:stop, None]).T
    if layer.L is not None and layer.R is not None:
        right, left = dense_factor(layer.R, layer.R_scale, 0), dense_factor(layer.L, layer.L_scale, 1)
        y += (z @ right.to(dtype).T) @ left.to(dtype).T
    if layer.rot_out is not None:
        y = hadamard(y, layer.block) * layer.rot_out.to(dtype)
    return y if layer.bias is None else y + layer.bias.to(dtype)


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
    """(address of a tensor, kind of its dtype); (0, 0) where there is none."""
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
    """As many threads as torch may use, but no more than have a tenth of a millisecond of work each."""
    return min(torch.get_num_threads(), 1 + (products >> 22))
