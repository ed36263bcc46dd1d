"""Codebooks of single weights: uniform grids, Lloyd-Max levels, NormalFloat. Codes count the levels from the least."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_lrq.codebooks.base import VectorCodebook, cached_table, look_up
from hf_lrq.codebooks.packing import TILE

UNIFORM_STEPS = {
    # J. Max (1960), Table II: the step of the equally spaced levels of least squared error for N(0, 1).
    2: 0.9957,
    3: 0.5860,
    4: 0.3352,
    # Not in that table: the minimiser of the same integral, found numerically (to 1e-12; the error is flat there).
    6: 0.104063009442,
    8: 0.030762383,
}

# Standard deviation of the Gaussian that the whole numbers from -2**(bits-1) to 2**(bits-1) - 1 suit best, by the same
# integral.
WHOLE_DEVIATIONS = {4: 2.95326808, 8: 32.5038588}

# Positive half of the levels of least squared error for N(0, 1), the other half mirrors it: J. Max (1960), Table I,
# with more digits from iterating "each level is the mean of its cell" to a fixed point in double precision.
LLOYD_HALVES = {
    2: (0.452780034636, 1.510417608499),
    3: (0.245094178944, 0.756005281206, 1.343909278505, 2.151945704537),
    4: (
        0.128395029851,
        0.388048299490,
        0.656759118532,
        0.942340456487,
        1.256231197347,
        1.618046386022,
        2.069017226531,
        2.732589570995,
    ),
}

# Quantiles of N(0, 1), half of them on either side of zero, over the largest of them. 4 bits: Dettmers et al., QLoRA,
# 2023, appendix E; 2 and 3 bits: the same construction, with the outermost quantile of 4 bits (Guo et al., LQ-LoRA,
# 2023).
NF_LEVELS = {
    2: (-1.0, 0.0, 0.33791519352165506, 1.0),
    3: (
        -1.0,
        -0.478629160115911,
        -0.21714181782574413,
        0.0,
        0.16093017270493618,
        0.33791519352165506,
        0.5626169700752371,
        1.0,
    ),
    4: (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
}

# The multiple of those levels of least squared error for N(0, 1), found numerically. The paper scales by the largest
# weight of a group instead; for a unit-variance codebook that maximum is not known.
NF_SCALES = {2: 1.371654013, 3: 2.196809016, 4: 2.86306292}


@dataclass(frozen=True)
class ScalarCodebook(VectorCodebook):
    """Ascending levels; the code of a value is the number of midpoints between levels that lie below it."""

    dim: ClassVar[int] = 1

    @property
    @abstractmethod
    def levels(self) -> tuple[float, ...]:
        """The 2**bits levels, code c means levels[c] rounded to float32; ascending, or `_nearest` is another."""

    def decode_packed(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Codebook`. At 4 bits, the two values of a byte are looked up as one number of twice their width."""
        if self.bits != 4 or dtype not in _PAIRS:
            return super().decode_packed(packed, dtype)
        self._check_packed(packed)
        pairs = _pairs(packed.device, _PAIRS[dtype], self, dtype).index_select(0, packed.flatten().int())
        return pairs.view(dtype).view(*packed.shape[:-2], packed.shape[-2] * TILE)

    def _nearest(self, x: Tensor) -> Tensor:
        return torch.bucketize(x.squeeze(1).contiguous(), _midpoints(x.device, x.dtype, self))

    def _points(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return look_up(_levels(codes.device, dtype, self), codes).unsqueeze(1)


@dataclass(frozen=True)
class Uniform(ScalarCodebook):
    """`int`: code c means (c + 1/2 - 2**(bits-1)) * step. The levels are symmetric and none is zero.

    Packed as all codes of rows are: a tile of 8 columns takes `bits` bytes; at 6 bits, 4 codes fill 3 bytes.

    >>> Uniform(2).encode(torch.tensor([[-9.0], [0.1], [0.9]])).tolist()  # The cells end at -0.9957, 0 and 0.9957.
    [0, 2, 2]
    """

    family: ClassVar[str] = "int"
    available_bits: ClassVar[tuple[int, ...]] = tuple(UNIFORM_STEPS)
    grouped: ClassVar[bool] = True

    @property
    def step(self) -> float:
        """Distance of neighbouring levels."""
        return UNIFORM_STEPS[self.bits]

    @property
    def levels(self) -> tuple[float, ...]:
        half = 2 ** (self.bits - 1)
        return tuple((k + 0.5) * self.step for k in range(-half, half))

    def _nearest(self, x: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        cells = (x.squeeze(1) / self.step).floor_().clamp_(-half, half - 1)
        return cells.add_(half).nan_to_num_(nan=0.0).long()


@dataclass(frozen=True)
class Whole(ScalarCodebook):
    """`gguf`: code c means c - 2**(bits-1), a whole number, so that the float16 scale of a group is the step itself.

    In groups of 32 and without rotations these are the blocks Q4_0 and Q8_0 of GGUF files, exactly.

    >>> Whole(4).encode(torch.tensor([[-9.0], [0.4], [9.0]])).tolist()
    [0, 8, 15]
    """

    family: ClassVar[str] = "gguf"
    available_bits: ClassVar[tuple[int, ...]] = tuple(WHOLE_DEVIATIONS)
    grouped: ClassVar[bool] = True

    @property
    def deviation(self) -> float:
        """See `Codebook`."""
        return WHOLE_DEVIATIONS[self.bits]

    @property
    def levels(self) -> tuple[float, ...]:
        half = 2 ** (self.bits - 1)
        return tuple(map(float, range(-half, half)))


@dataclass(frozen=True)
class LloydMax(ScalarCodebook):
    """`lloyd`: the levels of least squared error for N(0, 1)."""

    family: ClassVar[str] = "lloyd"
    available_bits: ClassVar[tuple[int, ...]] = tuple(LLOYD_HALVES)

    @property
    def levels(self) -> tuple[float, ...]:
        positive = LLOYD_HALVES[self.bits]
        return (*(-level for level in reversed(positive)), *positive)


@dataclass(frozen=True)
class NormalFloat(ScalarCodebook):
    """`nf`: the quantile-based levels of QLoRA, times the scale of least squared error for N(0, 1). Has a zero."""

    family: ClassVar[str] = "nf"
    available_bits: ClassVar[tuple[int, ...]] = tuple(NF_LEVELS)

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(level * NF_SCALES[self.bits] for level in NF_LEVELS[self.bits])


@cached_table
def _levels(book: ScalarCodebook) -> Tensor:
    """[2**bits]."""
    return torch.tensor(book.levels, dtype=torch.float32)


# Integers as wide as two values of a dtype.
_PAIRS = {torch.float32: torch.int64, torch.float16: torch.int32, torch.bfloat16: torch.int32}


@cached_table
def _pairs(book: ScalarCodebook, dtype: torch.dtype) -> Tensor:
    """[256], the values of the two codes of each byte."""
    every = torch.arange(256, dtype=torch.uint8).view(64, 1, 4)
    return book.decode(book.unpack(every), dtype).flatten().view(_PAIRS[dtype])


@cached_table
def _midpoints(book: ScalarCodebook) -> Tensor:
    """[2**bits - 1], between neighbouring levels."""
    levels = torch.tensor(book.levels, dtype=torch.float64)
    return (levels[1:] + levels[:-1]) / 2
