"""A compressed layer's tensors as kernels take them, and the products with them, by number of tokens.

Every buffer is allocated by torch within the call and nothing waits for the device or depends on values, so a call can
be captured in a CUDA graph: its buffers then come from the pool of the graph and live as long as it does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.kernels.triton.activations import prepare_kernel
from hf_lrq.kernels.triton.decoders import Decoder
from hf_lrq.kernels.triton.dequantize import dequantize_kernel
from hf_lrq.kernels.triton.dot import dot_kernel, factor_dot_kernel
from hf_lrq.kernels.triton.gemv import gemv_kernel
from hf_lrq.kernels.triton.launches import DotLaunch, GemvLaunch
from hf_lrq.kernels.triton.reduce import reduce_kernel

GROUP = 256  # columns that share a scale of the activations
REDUCED_ROWS = 128  # that a program of `reduce` computes at least
MOST_LAYERS = 4  # in a group


@dataclass(frozen=True, eq=False)
class Codes:
    """Q as stored.

    Attributes:
        weight: uint8, tiles [row blocks, tiles, bytes] or rows [out, tiles of 8, bits].
        scales: [out], or [out, groups].
        decoder: the decoder of the codebook.
        columns: number of columns without padding.
        group_size: columns per group of `scales`.
    """

    weight: Tensor
    scales: Tensor
    decoder: Decoder
    columns: int
    group_size: int

    @property
    def rows(self) -> int:
        """Number of rows without padding."""
        return self.scales.shape[0]

    @property
    def groups(self) -> int:
        """Number of groups of 256 columns."""
        return -(-self.columns // GROUP)

    @property
    def column_tiles(self) -> int:
        """Number of tiles of 16 columns, the last one perhaps not full."""
        return -(-self.columns // 16)

    @property
    def aligned(self) -> bool:
        """Whether rows start at words of four bytes."""
        return self.decoder.tiled or self.weight.shape[1] * self.decoder.bits % 4 == 0

    @property
    def tile_step(self) -> int:
        """Elements of `words` from a tile of 16 columns to the next."""
        if self.decoder.tiled:
            return 64 * self.decoder.bits
        return self.decoder.bits // 2 if self.aligned else 2 * self.decoder.bits

    @property
    def scale_group_size(self) -> int:
        """Columns per group of scales; 0 where a row has one scale."""
        return self.group_size if self.scales.ndim == 2 else 0

    @property
    def words(self) -> Tensor:
        """The codes as words of four bytes, or as bytes where rows are not aligned."""
        return self.weight.view(-1).view(torch.int32) if self.aligned else self.weight

    @property
    def scale_groups(self) -> int:
        """Number of scales per row."""
        return self.scales.shape[1] if self.scales.ndim == 2 else 1


@dataclass(frozen=True, eq=False)
class Factors:
    """L [out, r] and R [r, in] as stored, contiguous; scales None for float values."""

    L: Tensor
    R: Tensor
    L_scale: Tensor | None
    R_scale: Tensor | None

    @property
    def rank(self) -> int:
        """Number of ranks, padding excluded."""
        return self.R.shape[0] if self.R_scale is None else self.R_scale.shape[0]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Buffers of `activations.prepare`.

    Attributes:
        z: [tokens, padded columns] float32.
        bytes: [tokens * digits, padded columns * expand] int8.
        scales: [tokens * digits, groups] float32.
        sums: [tokens * digits, groups * 16] float32.
    """

    z: Tensor
    bytes: Tensor
    scales: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, tokens: int, digits: int, codes: Codes, device: torch.device) -> "Prepared":
        """Unwritten buffers."""
        vectors, groups = tokens * digits, codes.groups
        floats = torch.empty(tokens * groups * GROUP + vectors * groups * 17, dtype=torch.float32, device=device)
        z, scales, sums = floats.split((tokens * groups * GROUP, vectors * groups, vectors * groups * 16))
        data = torch.empty(vectors * groups * GROUP * codes.decoder.expand, dtype=torch.int8, device=device)
        return cls(z, data, scales, sums)


@dataclass(frozen=True, eq=False)
class Partials:
    """Sums over slices of columns: of Q z, [slices, vectors, rows], and of R z, [slices, tokens, rank]. float32."""

    codes: Tensor
    factors: Tensor | None
    vectors_per_token: int


def _log_block(block: int) -> int:
    return block.bit_length() - 1


def _nibbles(data: Tensor) -> bool:
    return data.dtype == torch.uint8


def prepare(x: Tensor, rot_in: Tensor | None, block: int, digits: int, codes: Codes, *, planes: bool) -> Prepared:
    """Activations in the order that the kernels read.

    Args:
        x: [tokens, columns], unit stride along columns.
        planes: order of the bytes, see `dot_kernel`.
    """
    out = Prepared.empty(len(x), digits, codes, x.device)
    decoder = codes.decoder
    tile_stride, quad_stride = (1, codes.groups * 16) if planes else (4 * decoder.expand, 1)
    prepare_kernel[(codes.groups, len(x))](
        x, rot_in, out.z, out.bytes, out.scales, out.sums, codes.groups, codes.columns, x.stride(0), tile_stride,
        quad_stride, LOG_BLOCK=_log_block(block), DIGITS=digits, EXPAND=decoder.expand, BITS=decoder.bits,
        MIX=decoder.mix, SPREAD=decoder.spread, num_warps=1,
    )  # fmt: skip
    return out


def gemv(
    x: Tensor,
    rot_in: Tensor | None,
    block: int,
    digits: int,
    codes: Codes,
    factors: Factors | None,
    launch: GemvLaunch,
    *,
    assembly: bool,
) -> Partials:
    """Partial sums for one to three tokens x [tokens, columns]; block: that of the input transform, at most 256."""
    tokens, decoder = len(x), codes.decoder
    buffers = (
        Prepared.empty(tokens, digits, codes, x.device)
        if launch.fused
        else prepare(x, rot_in, block, digits, codes, planes=False)
    )
    per_split = -(-codes.groups // launch.splits)
    splits = -(-codes.groups // per_split)
    rank = 0 if factors is None else factors.rank
    ranks = 16
    partials = x.new_empty(splits, tokens, codes.rows, dtype=torch.float32)
    factor_partials = x.new_empty(splits, tokens, rank, dtype=torch.float32)
    code_blocks = -(-codes.rows // launch.rows)
    # Tiles that share the scales of both sides.
    period = math.gcd(codes.scale_group_size or GROUP, GROUP) // 16
    first, second = decoder.multipliers
    gemv_kernel[(code_blocks + -(-rank // ranks), splits)](
        x, rot_in, buffers.z, buffers.bytes, buffers.scales, buffers.sums, codes.words, codes.scales,
        None if factors is None else factors.R, partials, factor_partials, codes.columns, x.stride(0), codes.groups,
        per_split, code_blocks, codes.weight.shape[1], codes.column_tiles, codes.rows, codes.scale_groups,
        rank,
        TOKENS=tokens, DIGITS=digits, EXPAND=decoder.expand, BITS=decoder.bits, M1=first, M2=second,
        OFFSET=decoder.offset, GROUP_SIZE=codes.scale_group_size, PERIOD=period, TILE_STEP=codes.tile_step,
        ALIGNED=codes.aligned, LOAD=decoder.load, PRODUCTS=decoder.products, MIX=decoder.mix, SPREAD=decoder.spread,
        LOG_BLOCK=_log_block(block), NIBBLES=factors is not None and _nibbles(factors.R), FUSED=launch.fused,
        AT_ONCE=min(launch.warps, 1 << (per_split - 1).bit_length()), ROWS=launch.rows,
        TILES=min(launch.tiles, period), RANKS=ranks, MASKED=bool(codes.rows % launch.rows or codes.columns % GROUP),
        ASM=assembly, num_warps=launch.warps,
    )  # fmt: skip
    return Partials(partials, factor_partials, 1)


def dot(
    x: Tensor,
    rot_in: Tensor | None,
    block: int,
    digits: int,
    codes: Codes,
    factors: Factors | None,
    launch: DotLaunch,
    *,
    assembly: bool,
) -> Partials:
    """Partial sums for any number of tokens x [tokens, columns] by tensor cores."""
    tokens, decoder = len(x), codes.decoder
    buffers = prepare(x, rot_in, block, digits, codes, planes=True)
    vectors = tokens * digits
    per_split = -(-codes.groups // launch.splits)
    splits = -(-codes.groups // per_split)
    partials = x.new_empty(splits, vectors, codes.rows, dtype=torch.float32)
    first, second = decoder.multipliers
    dot_kernel[(-(-codes.rows // launch.rows), splits, -(-vectors // launch.vectors))](
        buffers.bytes, buffers.scales, buffers.sums, codes.words, codes.scales, partials, vectors, codes.groups,
        per_split, codes.weight.shape[1], codes.column_tiles, codes.rows, codes.scale_groups,
        EXPAND=decoder.expand, BITS=decoder.bits, M1=first, M2=second, OFFSET=decoder.signed_offset,
        BIAS=decoder.byte_bias, GROUP_SIZE=codes.scale_group_size, TILE_STEP=codes.tile_step,
        ALIGNED=codes.aligned, LOAD=decoder.load, PRODUCTS=decoder.products, ROWS=launch.rows, VECTORS=launch.vectors,
        TILES=8 if codes.scale_group_size else 16, ASM=assembly, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if factors is None:
        return Partials(partials, None, digits)
    factor_partials = x.new_empty(splits, tokens, factors.rank, dtype=torch.float32)
    factor_dot_kernel[(-(-factors.rank // 16), splits, -(-tokens // 16))](
        buffers.z, factors.R, factor_partials, tokens, codes.groups * GROUP, codes.columns, factors.rank, codes.groups,
        per_split, NIBBLES=_nibbles(factors.R), RANKS=16, TOKENS=16, num_warps=2,
    )  # fmt: skip
    return Partials(partials, factor_partials, digits)


def reduce(
    partials: Partials,
    codes: Codes,
    factors: Factors | None,
    rot_out: Tensor | None,
    bias: Tensor | None,
    block: int,
    out: Tensor,
    *,
    assembly: bool,
    ends: tuple[int, ...] = (),
) -> None:
    """Fill out [tokens, rows] from partial sums.

    Args:
        block: block size of the output transform, at most 256.
        ends: rows at which each layer of a group but the last ends, multiples of what a program computes. R and its
            scales then have the ranks of all of them, L those of one.
    """
    grouped = codes.scales.ndim == 2
    rows = max(REDUCED_ROWS, block)
    splits = partials.codes.shape[0]
    ranks = 0 if factors is None else factors.rank
    first, second, third = (*ends, *[codes.rows] * (MOST_LAYERS - 1 - len(ends)))
    reduce_kernel[(-(-codes.rows // rows), len(out))](
        partials.codes, partials.factors, None if grouped else codes.scales, None if factors is None else factors.L,
        None if factors is None else factors.L_scale, None if factors is None else factors.R_scale, rot_out, bias, out,
        splits, splits, partials.vectors_per_token, len(out), codes.rows, codes.rows,
        ranks, ranks // (len(ends) + 1), 0 if factors is None else factors.L.shape[1], first, second, third,
        codes.decoder.gain, LOG_BLOCK=_log_block(block), NIBBLES=factors is not None and _nibbles(factors.L),
        ROWS=rows, RANKS=32, ASM=assembly, num_warps=4,
    )  # fmt: skip


def dequantize(codes: Codes, start: int, stop: int, out: Tensor, *, scaled: bool, assembly: bool) -> None:
    """Fill out [stop - start, columns] with the values of rows [start, stop), times their scales if `scaled`."""
    decoder = codes.decoder
    first, second = decoder.multipliers
    rows, tiles = 64, 16
    dequantize_kernel[(-(-(stop - start) // rows), -(-codes.column_tiles // tiles))](
        codes.words, codes.scales if scaled else None, out, start, stop, codes.columns, codes.weight.shape[1],
        codes.column_tiles, codes.scale_groups, decoder.gain, BITS=decoder.bits, M1=first, M2=second,
        OFFSET=decoder.offset, GROUP_SIZE=codes.scale_group_size, ALIGNED=codes.aligned, LOAD=decoder.load,
        COLUMN=decoder.column, ROWS=rows, TILES=tiles, ASM=assembly, num_warps=4,
    )  # fmt: skip
