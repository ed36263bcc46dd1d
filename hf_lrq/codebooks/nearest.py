"""Nearest points of the lattice codebooks, in exact integer arithmetic.

An input is first rounded to a multiple of 2**-24 of at most 2**22 in size; a NaN counts as 0. From there on everything
is an integer below 2**53, so sums are exact in any order and in double precision too, and ties go to the candidate that
is tried first. So every backend that takes over an operator of this file returns the same codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lrq.codebooks.base import cached_table, look_up

FRACTION = 24  # Bits after the point.
LARGEST = float(2**46)  # In units of 2**-24.

# Kinds of rows of E8P by their number of 3/2 and of 5/2, the other coordinates being 1/2. Each of the first seven is in
# the codebook in every order of its coordinates; of the last, 29 orders of 56.
KINDS = ((0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1), (5, 0))
FULL_KINDS = len(KINDS) - 1
FULL_ROWS = 227

torch.library.define("hf_lrq::nearest_e8p", "(Tensor rows, Tensor row_of_key, Tensor x) -> Tensor")
torch.library.define("hf_lrq::nearest_point", "(Tensor points, Tensor x) -> Tensor")


def e8p_codes(rows: Tensor, row_of_key: Tensor, x: Tensor) -> Tensor:
    """Codes of the nearest points of E8P; the docstring of `codebooks.lattice` says what a code means.

    For one shift, let y = x - shift; the nearest point has the largest <y, signs * row> - |row|^2 / 2. Its signs are
    those of y or, where their parity is wrong for the row, those of y with one flipped. Within a kind of rows that
    exists in every order, exchanging two coordinates shows: the row ascends with |y|, and the flip belongs to the
    smallest |y|, which meets a 1/2. So a kind has one candidate, and its score is linear in the sorted |y| once the
    last of them carries the sign of the flip. For the kind that exists in part this score is an upper bound: where it
    wins with an absent row, the rows that exist are tried one by one.

    Of equal |y| the larger coordinate stands first. Candidates are tried kind by kind, then row by row, each with the
    shift of +1/4 before that of -1/4.

    Args:
        rows: [256, 8] uint8: 0, 1, 2 for 1/2, 3/2, 5/2.
        row_of_key: [65536] int16: row whose coordinate i has bits 2 i and 2 i + 1 of the key, -1 where there is none.
        x: [n, 8] float32.

    Returns:
        [n] int64.
    """
    result: Tensor = torch.ops.hf_lrq.nearest_e8p(rows, row_of_key, x)
    return result


def point_codes(points: Tensor, x: Tensor) -> Tensor:
    """Index of the nearest of a few points to each row of x, the first of equals.

    Args:
        points: [k, 8] float32, multiples of 1/2, at most 8 in size.
        x: [n, 8] float32.

    Returns:
        [n] int64.
    """
    result: Tensor = torch.ops.hf_lrq.nearest_point(points, x)
    return result


def nearest_e8p(rows: Tensor, row_of_key: Tensor, x: Tensor) -> Tensor:
    """The reference of `e8p_codes`."""
    # Coordinates first: every step then runs along the inputs.
    fixed = _fixed_point(x.T)  # [8, n]
    folded = _fold(fixed)
    _, codes = _best_of_kinds(row_of_key, folded, folded.scores)
    absent = (codes < 0).nonzero().squeeze(1)
    if len(absent):
        folded = Folded(*(part.index_select(-1, absent) for part in folded))
        score, code = _best_of_kinds(row_of_key, folded, folded.scores[:FULL_KINDS])
        row_score, row_code = _best_of_rows(rows[FULL_ROWS:].long(), fixed.index_select(1, absent), folded)
        codes[absent] = torch.where(row_score > score, row_code, code)
    return codes


def nearest_point(points: Tensor, x: Tensor) -> Tensor:
    """The reference of `point_codes`."""
    points = points.double()
    bias = biases(points)
    # In parts, because 256 scores per input soon fill a processor's cache.
    parts = [torch.addmm(bias, _fixed_point(part).double(), points.T).argmax(1) for part in torch.split(x, 1024)]
    return torch.cat(parts)


def biases(points: Tensor) -> Tensor:
    """What a score has beside <x, point>, for points [k, 8] float64: -|point|^2 / 2 in units of 2**-24, [k]."""
    return points.square().sum(1) * -(2.0 ** (FRACTION - 1))


def _fixed_point(x: Tensor) -> Tensor:
    """x in units of 2**-24, int64."""
    scaled = x.double() * 2.0**FRACTION
    return scaled.round_().clamp_(-LARGEST, LARGEST).nan_to_num_(nan=0.0).long().contiguous()


class Folded(NamedTuple):
    """Inputs x [8, n] less each of the two shifts, folded to descending magnitudes.

    Attributes:
        scores: 4 * 2**24 times the score of the candidate of each kind (an upper bound for the last kind), [kinds, 2,
            n] float64.
        order: coordinate at each place of the descending order, in the low 3 bits, [8, 2, n] int64.
        signs: bit i is set where coordinate i is negative, [2, n] int64.
        odd: whether the number of negative coordinates is odd, [2, n] int64 of 0 and 1.
    """

    scores: Tensor
    order: Tensor
    signs: Tensor
    odd: Tensor


def _fold(x: Tensor) -> Folded:
    device = x.device
    y = x.unsqueeze(1) - _shifts(device, x.dtype)  # [8, 2, n]
    # Single precision is exact here, and so is whatever the host has allowed for products of matrices.
    signs = (_bit_values(device, torch.float32) @ (y < 0).flatten(1).float()).long()  # [2 n]
    odd = look_up(_parity(device, signs.dtype), signs)
    order = y.abs() << 3 | _coordinates(device, torch.int64)
    _sort_descending(order)
    magnitudes = (order >> 3).flatten(1)  # [8, 2 n]
    magnitudes[7] *= 1 - 2 * odd
    profiles = _profiles(device, torch.float64)
    biases = profiles.square().sum(1, keepdim=True) * -(2.0 ** (FRACTION - 3))
    scores = torch.addmm(biases, profiles, magnitudes.double()).view(len(profiles), *y.shape[1:])
    return Folded(scores + _shift_scores(x), order, signs.view(2, -1), odd.view(2, -1))


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
    """<x, 4 shift>, [2, n]: the part of the score of a point that is not <y, signs * row> - |row|^2 / 2."""
    total = x.sum(0)
    return torch.stack((total, -total))


def _best_of_kinds(row_of_key: Tensor, folded: Folded, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of scores [kinds, 2, n] and its code: both [n]; the code is negative where the row is absent."""
    device = scores.device
    score, best = scores.flatten(0, 1).max(0)
    kind, shift = best >> 1, best & 1
    order = _of_shift(folded.order, shift) & 7  # [8, n]
    key = (_digits(device, torch.int64).index_select(1, kind) << 2 * order).sum(0)
    row = look_up(row_of_key, key).long()
    wrong = _of_shift(folded.odd, shift) ^ look_up(_kind_is_odd(device, torch.int64), kind)
    return score, _join(row, shift, _of_shift(folded.signs, shift) ^ wrong << order[7])


def _best_of_rows(rows: Tensor, x: Tensor, folded: Folded) -> tuple[Tensor, Tensor]:
    """Largest score and its code over the rows [29, 8] of the last kind, tried one by one: both [n]."""
    magnitudes = (x.unsqueeze(1) - _shifts(x.device, x.dtype)).abs()
    products = (4 * rows + 2).view(-1, 8, 1, 1) * magnitudes  # [29, 8, 2, n]
    cheapest, coordinate = products.min(1)
    # The sum of these rows is odd, so it takes an odd number of negative coordinates.
    wrong = 1 - folded.odd
    norm = (2 * rows[0] + 1).square().sum()
    scores = products.sum(1) - 2 * wrong * cheapest - (norm << FRACTION - 1) + _shift_scores(x)
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
def _digits() -> Tensor:
    """[8, kinds] int64: the kinds, descending, with 2 for 5/2, 1 for 3/2 and 0 for 1/2."""
    return torch.tensor([[2] * fives + [1] * threes + [0] * (8 - fives - threes) for threes, fives in KINDS]).T


@cached_table
def _kind_is_odd() -> Tensor:
    """[kinds] int64: whether the sum of a row is odd; it is 4 + threes + 2 fives."""
    return torch.tensor([threes % 2 for threes, _ in KINDS])


@cached_table
def _profiles() -> Tensor:
    """[kinds, 8] int64: four times the kinds, descending, the last value negated for odd kinds.

    The last magnitude is negated for odd inputs, so it comes in with a minus exactly where the parities differ.
    """
    cpu = torch.device("cpu")
    profiles = 2 + 4 * _digits(cpu, torch.int64).T
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
    """[2, 1] int64, by the bit of the shift: +-1/4."""
    return torch.tensor([[1], [-1]]) << FRACTION - 2


torch.library.register_kernel("hf_lrq::nearest_e8p", None, nearest_e8p)
torch.library.register_kernel("hf_lrq::nearest_point", None, nearest_point)
