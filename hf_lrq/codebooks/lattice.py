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
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_lrq.codebooks.base import VectorCodebook, cached_table, look_up

# Kinds of rows by their number of 3/2 and of 5/2, the other coordinates being 1/2. Each of the first seven is in the
# codebook in every order of its coordinates; of the last, 29 orders of 56.
KINDS = ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1), (5, 0))
FULL_KINDS = len(KINDS) - 1
FULL_ROWS = 227


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
    """The 65,536 points of E8P.

    Nearest point: for one shift, let y = x - shift; the nearest point has the largest <y, signs * row> - |row|^2 / 2.
    Its signs are those of y or, where their parity is wrong for the row, those of y with one flipped. Within a kind of
    rows that exists in every order, exchanging two coordinates shows: the row ascends with |y|, and the flip belongs to
    the smallest |y|, which meets a 1/2. So a kind has one candidate, and its score is linear in the sorted |y| once the
    last of them carries the sign of the flip. For the kind that exists in part this score is an upper bound: where it
    wins with an absent row, the rows that exist are tried one by one.
    """

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
        # Coordinates first: every step then runs along the inputs.
        x = x.T.contiguous()  # [8, n]
        folded = _fold(x)
        _, codes = _best_of_kinds(folded, folded.scores)
        absent = (codes < 0).nonzero().squeeze(1)
        if len(absent):
            folded = Folded(*(part.index_select(-1, absent) for part in folded))
            score, code = _best_of_kinds(folded, folded.scores[:FULL_KINDS])
            row_score, row_code = _best_of_rows(x.index_select(1, absent), folded)
            codes[absent] = torch.where(row_score > score, row_code, code)
        return codes


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
        points = _points(x.device, torch.float64, self)
        bias = points.square().sum(1) / -2
        # Double precision, because the host may have allowed less than float32 for products of matrices. In parts,
        # because 256 scores per input soon fill a processor's cache.
        return torch.cat([torch.addmm(bias, part.double(), points.T).argmax(1) for part in torch.split(x, 1024)])


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


class Folded(NamedTuple):
    """Inputs x [8, n] less each of the two shifts, folded to descending magnitudes.

    Attributes:
        scores: score of the candidate of each kind (an upper bound for the last kind), [kinds, 2, n].
        order: coordinate at each place of the descending order, in the low 3 bits, [8, 2, n] int64.
        signs: bit i is set where coordinate i is negative, [2, n] int64.
        odd: whether the number of negative coordinates is odd, [2, n] int64 of 0 and 1.
    """

    scores: Tensor
    order: Tensor
    signs: Tensor
    odd: Tensor


def _fold(x: Tensor) -> Folded:
    device, dtype = x.device, x.dtype
    y = x.unsqueeze(1) - _shifts(device, dtype)  # [8, 2, n]
    signs = (_bit_values(device, dtype) @ (y < 0).flatten(1).to(dtype)).long()  # [2 n]; exact in any precision.
    odd = look_up(_parity(device, signs.dtype), signs)
    # The bits of a non-negative float32 sort as an integer; below them goes the coordinate, which also settles ties.
    order = y.abs().view(torch.int32).long() << 3 | _coordinates(device, torch.int64)
    _sort_descending(order)
    magnitudes = (order >> 3).to(torch.int32).view(dtype).flatten(1)  # [8, 2 n]
    magnitudes[7] *= 1 - 2 * odd
    profiles = _profiles(device, torch.float64)
    # Double precision, because the host may have allowed less than float32 for products of matrices.
    scores = torch.addmm(profiles.square().sum(1, keepdim=True) / -2, profiles, magnitudes.double())
    return Folded(scores.to(dtype).view_as(y) + _shift_scores(x), order, signs.view(2, -1), odd.view(2, -1))


def _sort_descending(values: Tensor) -> None:
    """Sort [8, ...] in place along the first axis, by the odd-even merging network of Batcher (1968)."""
    pairs = values.reshape(2, 2, 2, *values.shape[1:])
    for larger, smaller in (
        (values[0::2], values[1::2]),
        (pairs[:, 0], pairs[:, 1]),
        (values[1::4], values[2::4]),
        (values[:4], values[4:]),
        (values[2:4], values[4:6]),
        (values[1:7:2], values[2:8:2]),
    ):
        maximum = torch.maximum(larger, smaller)
        torch.minimum(larger, smaller, out=smaller)
        larger.copy_(maximum)


def _shift_scores(x: Tensor) -> Tensor:
    """<x, shift>, [2, n]: the part of the score of a point that is not <y, signs * row> - |row|^2 / 2."""
    return x.sum(0) * _shifts(x.device, x.dtype)


def _best_of_kinds(folded: Folded, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of scores [kinds, 2, n] and its code: both [n]; the code is negative where the row is absent."""
    device = scores.device
    score, best = scores.flatten(0, 1).max(0)
    kind, shift = best >> 1, best & 1
    order = _of_shift(folded.order, shift) & 7  # [8, n]
    key = (_digits(device, torch.int64).index_select(1, kind) << 2 * order).sum(0)
    row = look_up(_row_of_key(device, torch.int64), key)
    wrong = _of_shift(folded.odd, shift) ^ look_up(_kind_is_odd(device, torch.int64), kind)
    return score, _join(row, shift, _of_shift(folded.signs, shift) ^ wrong << order[7])


def _best_of_rows(x: Tensor, folded: Folded) -> tuple[Tensor, Tensor]:
    """Largest score and its code over the rows of the last kind, tried one by one: both [n]."""
    rows = _rows(x.device, x.dtype)[FULL_ROWS:]
    magnitudes = (x.unsqueeze(1) - _shifts(x.device, x.dtype)).abs()
    products = rows.view(-1, 8, 1, 1) * magnitudes  # [29, 8, 2, n]
    cheapest, coordinate = products.min(1)
    # The sum of these rows is odd, so it takes an odd number of negative coordinates.
    wrong = 1 - folded.odd
    half_norm = rows[0].square().sum() / 2
    scores = products.sum(1) - 2 * wrong * cheapest - half_norm + _shift_scores(x)
    score, best = scores.flatten(0, 1).max(0)
    row, shift = best >> 1, best & 1
    flip = _of_shift(wrong, shift) << coordinate.flatten(0, 1).gather(0, best.unsqueeze(0)).squeeze(0)
    return score, _join(FULL_ROWS + row, shift, _of_shift(folded.signs, shift) ^ flip)


def _of_shift(values: Tensor, shift: Tensor) -> Tensor:
    """The values [..., 2, n] of shift [n], 0 or 1: [..., n]."""
    return torch.where(shift.bool(), values[..., 1, :], values[..., 0, :])


def _join(row: Tensor, shift: Tensor, signs: Tensor) -> Tensor:
    return row << 8 | shift << 7 | signs & 127


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
def _row_of_key() -> Tensor:
    """[65536] int64: row of each key, -1 where there is none. A key has `_digits` in two bits per coordinate."""
    digits = _rows(torch.device("cpu"), torch.int64)  # 1/2, 3/2, 5/2 round down to 0, 1, 2.
    keys = (digits << 2 * torch.arange(8)).sum(1)
    return torch.full((2**16,), -1).scatter_(0, keys, torch.arange(256))


@cached_table
def _digits() -> Tensor:
    """[8, kinds] int64: the kinds, descending, with 2 for 5/2, 1 for 3/2 and 0 for 1/2."""
    return torch.tensor([[2] * fives + [1] * threes + [0] * (8 - fives - threes) for threes, fives in KINDS]).T


@cached_table
def _kind_is_odd() -> Tensor:
    """[kinds] int64: whether the sum of a row is odd; it is 4 + threes + 2 fives."""
    return torch.tensor([threes % 2 for threes, _ in KINDS])


@cached_table
def _profiles() -> Tensor:
    """[kinds, 8] float32: the kinds, descending, the last value negated for odd kinds.

    The last magnitude is negated for odd inputs, so it comes in with a minus exactly where the parities differ.
    """
    cpu = torch.device("cpu")
    profiles = 0.5 + _digits(cpu, torch.float32).T
    profiles[:, 7] *= 1 - 2 * _kind_is_odd(cpu, torch.int64)
    return profiles


@cached_table
def _parity() -> Tensor:
    """[256] int64: number of set bits, modulo 2."""
    return torch.tensor([bin(byte).count("1") % 2 for byte in range(256)])


@cached_table
def _bit_values() -> Tensor:
    """[8] float32: 1, 2, 4, ... 128."""
    return torch.tensor([float(1 << bit) for bit in range(8)], dtype=torch.float32)


@cached_table
def _coordinates() -> Tensor:
    """[8, 1, 1] int64."""
    return torch.arange(8).view(8, 1, 1)


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
