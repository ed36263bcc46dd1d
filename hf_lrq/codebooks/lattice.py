"""Codebooks of eight weights at a time: E8P (2 bits per weight), alone or followed by a lattice for its residual.

Format of E8P. The construction is that of Tseng et al., QuIP#, 2024, section 4.2; the order of the rows, the layout of
the bits and 29 of the rows are our own.

- A row is eight absolute values in {1/2, 3/2, 5/2}. The 256 rows are, in this order: the 227 of squared norm at most
  10, by norm; of the 56 with five 3/2 and three 1/2 (squared norm 12) the 28 whose 1/2 stand at positions, 0 to 7, with
  an even sum; and the first of the other 28. Equals in this order ascend lexicographically.
- A code has 16 bits. Bits 0..6: signs of the coordinates 0..6 (set: negative). Bit 7: the shift. Bits 8..15: the row.
  Coordinate 7 is negative if that makes the sum of the coordinates even.
- The shift adds 1/4 to every coordinate (bit clear) or subtracts it (bit set).

So a coordinate is k/4 with k odd and |k| <= 11, and the 65,536 points are distinct.

Format of the second stage. At 4 bits a second E8P point is added; at 3 bits, one of 256 vectors of E8: those of squared
norm at most 2 (241) and the +-2 e_i (16) by norm, then ascending lexicographically, without the last, +2 e_0. The first
stage takes the low 16 bits of a code, the second those above.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_lrq.codebooks.base import VectorCodebook, cached_table, look_up
from hf_lrq.codebooks.nearest import e8p_codes, point_codes


class Lattice(ABC):
    """Finitely many points in R^8, before scaling."""

    bits: ClassVar[int]

    @abstractmethod
    def points(self) -> Tensor:
        """Point of every code: [2**bits, 8] float32, computed anew."""

    @abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """Code of the nearest point to each row of x [n, 8] float32: [n] int64."""


@dataclass(frozen=True)
class E8PGrid(Lattice):
    """The 65,536 points of E8P."""

    bits: ClassVar[int] = 16

    def points(self) -> Tensor:
        codes = torch.arange(2**self.bits)
        rows = _rows(codes.device, torch.float32)[codes >> 8]
        negative = (codes.unsqueeze(1) >> torch.arange(7)) & 1  # [65536, 7]
        # A flipped sign changes the sum by an odd number, so the last sign can always make it even.
        last = (rows.sum(1).long() + negative.sum(1)) & 1
        signs = 1 - 2 * torch.cat((negative, last.unsqueeze(1)), dim=1)
        return rows * signs + _shifts(codes.device, torch.float32)[codes >> 7 & 1]

    def nearest(self, x: Tensor) -> Tensor:
        return e8p_codes(_digits(x.device, torch.uint8), _row_of_key(x.device, torch.int16), x)


@dataclass(frozen=True)
class E8Ball(Lattice):
    """256 short vectors of E8, at 1 bit per weight."""

    bits: ClassVar[int] = 8

    def points(self) -> Tensor:
        # All of these are twice the vectors, so the condition "even sum" reads "sum divisible by 4".
        integers = torch.cartesian_prod(*[torch.tensor([-2, 0, 2])] * 8)
        halves = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 8)
        short = torch.cat((integers[integers.square().sum(1) <= 8], halves))
        axes = 4 * torch.eye(8, dtype=torch.int64)
        doubled = torch.cat((short[short.sum(1) % 4 == 0], axes, -axes))
        lexicographic = ((doubled + 4) * 9 ** torch.arange(7, -1, -1)).sum(1)
        order = (doubled.square().sum(1) * 9**8 + lexicographic).argsort()
        return doubled[order[: 2**self.bits]].to(torch.float32) / 2

    def nearest(self, x: Tensor) -> Tensor:
        return point_codes(_points(x.device, torch.float32, self), x)


@dataclass(frozen=True)
class Stage:
    """A lattice scaled for inputs of unit variance, or for what an earlier stage leaves of them.

    Attributes:
        lattice: the lattice of its points.
        scale: factor that the points are multiplied by.
    """

    lattice: Lattice
    scale: float

    def nearest(self, x: Tensor) -> Tensor:
        """Code of the nearest point to each row of x [n, 8] float32: [n] int64."""
        return self.lattice.nearest(x / self.scale)

    def points_at(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """[n, 8]."""
        return look_up(_scaled_points(codes.device, dtype, self), codes)


# First and second stage by bits per weight. Each scale is the best fraction over 64, or pair of them, for 200,000 draws
# from N(0, I_8) (for the 4-bit pair, of those with an even first numerator). Over 64, a point of any of these codebooks
# is a fraction over 256 with a numerator below 2048, exact in float16.
STAGES = {
    2: (Stage(E8PGrid(), 62 / 64), None),
    3: (Stage(E8PGrid(), 65 / 64), Stage(E8Ball(), 32 / 64)),
    4: (Stage(E8PGrid(), 72 / 64), Stage(E8PGrid(), 19 / 64)),
}


@dataclass(frozen=True)
class E8P(VectorCodebook):
    """`e8p`: E8P at 2 bits; at 3 and 4 bits, a second lattice codes what the first leaves.

    >>> E8P(2).decode(torch.tensor(0))[:3].tolist()  # Row 0 is eight times 1/2: (1/2 + 1/4) * 62/64.
    [0.7265625, 0.7265625, 0.7265625]
    """

    family: ClassVar[str] = "e8p"
    dim: ClassVar[int] = 8
    available_bits: ClassVar[tuple[int, ...]] = tuple(STAGES)
    chunk: ClassVar[int] = 1 << 13  # Intermediates that stay in a processor's cache.

    def _nearest(self, x: Tensor) -> Tensor:
        first, second = STAGES[self.bits]
        codes = first.nearest(x)
        if second is None:
            return codes
        return codes | second.nearest(x - first.points_at(codes, x.dtype)) << first.lattice.bits

    def _points(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        first, second = STAGES[self.bits]
        if second is None:
            return first.points_at(codes, dtype)
        codes = codes.long()
        low = codes & (2**first.lattice.bits - 1)
        values = first.points_at(low, torch.float32)
        return values.add_(second.points_at(codes >> first.lattice.bits, torch.float32)).to(dtype)


@cached_table
def _rows() -> Tensor:
    """[256, 8] float32; the docstring of the module has the order."""
    doubled = torch.cartesian_prod(*[torch.tensor([1, 3, 5])] * 8)  # Ascending lexicographically.
    norms = doubled.square().sum(1)  # 4 |row|^2
    uneven = ((doubled == 1) * torch.arange(8)).sum(1) % 2
    rank = torch.where(norms < 48, 2 * norms, 2 * norms + uneven)
    rank[(norms == 48) & (doubled.amax(1) == 5)] = rank.amax()  # Squared norm 12 with a 5/2: not used.
    return doubled[rank.argsort(stable=True)[:256]].to(torch.float32) / 2


@cached_table
def _digits() -> Tensor:
    """[256, 8] int64: the rows, with 0, 1, 2 for 1/2, 3/2, 5/2."""
    return _rows(torch.device("cpu"), torch.int64)  # Rounded down.


@cached_table
def _row_of_key() -> Tensor:
    """[65536] int64: row of each key, -1 where there is none. A key has `_digits` in two bits per coordinate."""
    keys = (_digits(torch.device("cpu"), torch.int64) << 2 * torch.arange(8)).sum(1)
    return torch.full((2**16,), -1).scatter_(0, keys, torch.arange(256))


@cached_table
def _shifts() -> Tensor:
    """[2, 1] float32, by the bit of the shift."""
    return torch.tensor([[0.25], [-0.25]], dtype=torch.float32)


@cached_table
def _points(lattice: Lattice) -> Tensor:
    """[2**bits, 8] float32."""
    return lattice.points()


@cached_table
def _scaled_points(stage: Stage) -> Tensor:
    """[2**bits, 8] float32."""
    return stage.lattice.points() * stage.scale
