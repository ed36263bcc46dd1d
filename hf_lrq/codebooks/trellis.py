"""Trellis codebooks: rows are coded as paths, and a weight is computed from the last 16 bits of its path.

Trellis-coded quantization with computed points (Tseng et al., QTIP, 2024); the two codes here are our own choice.

Format. A tile of 128 rows and 16 columns is 16 circular streams of bits. Stream l holds the rows l, l + 16, ...,
l + 112, one after another, the 16 columns of a row in order, `bits` bits a weight, least significant bit first. A tile
is stored as 32-bit little-endian words [4 * bits][16 streams], so that word w of all streams stand together.

`bt`, the byte-step trellis: each byte of a stream, b, gives 8 / bits weights together with the byte before it, a. With
P = M1 * (b, a, b, a) and Q = M2 * (a, b, a, b), four bytes read as a little-endian number, products modulo 2**32:

    2 bits: y_v = P[v] + Q[v] - 255 for the four bytes v
    4 bits: y_0 = s0 - s1 + s2 - s3, y_1 = s0 + s1 - s2 - s3, where s_v = P[v] + Q[v]

`tcq`: each weight takes the next `bits` bits of the stream; with s the 16 bits that end there, newest most significant,
y is the sum of the four bytes of M s modulo 2**32, less 510.

A weight is `gain` times y. So the products are dot-product operands as they are: no table, no unpacking.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_lrq.codebooks.base import Codebook, cached_table, look_up
from hf_lrq.codebooks.viterbi import bit_path, byte_path

ROWS, COLUMNS, STREAMS = 128, 16, 16
ROWS_PER_STREAM = ROWS // STREAMS
LARGEST_TARGET = 511  # In units of the points; beyond the outermost ones, and small enough for exact 32-bit costs.

# Part of the format, by bits per weight. The pairs are the best of some 30,000 (2 bits) and 4,000 (4 bits), drawn at
# random and then changed bit by bit, on Gaussian sources; examples/benchmarks/trellis_constants.py searches like that.
# The single multiplier is that of the `mul1` code of exllamav3. Gains are those of least squared error, over 2**16.
BYTE_MULTIPLIERS = {2: (0x98A85CDD, 0x439E7501), 4: (0x63492BED, 0xD4737759)}
BYTE_GAINS = {2: 672 / 65536, 4: 316 / 65536}
BIT_MULTIPLIERS = {2: 0x83DCD12D, 3: 0x83DCD12D, 4: 0x83DCD12D}
BIT_GAINS = {2: 433 / 65536, 3: 441 / 65536, 4: 444 / 65536}


@dataclass(frozen=True)
class Trellis(Codebook):
    """What both trellises share: tiles, streams, and a code that holds the 16 weights of a row in a tile."""

    dim: ClassVar[int] = COLUMNS
    row_block: ClassVar[int] = ROWS
    column_block: ClassVar[int] = COLUMNS

    @property
    def unit(self) -> int:
        """Targets are rounded to multiples of unit * gain."""
        return 1

    @property
    @abstractmethod
    def gain(self) -> float:
        """Value of a weight per unit of y."""

    @property
    @abstractmethod
    def multipliers(self) -> tuple[int, ...]:
        """Multipliers of the hash."""

    def pool_rows(self, values: Tensor) -> Tensor:
        rows, n = values.shape
        streams = values.view(-1, ROWS_PER_STREAM, STREAMS, n)
        return streams.sum(1, keepdim=True).expand_as(streams).reshape(rows, n)

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        return -(-out_features // ROWS), -(-in_features // COLUMNS), 2 * ROWS * self.bits

    def pack(self, codes: Tensor) -> Tensor:
        shifts = 8 * torch.arange(2 * self.bits, device=codes.device)
        stored = (codes.unsqueeze(-1) >> shifts & 255).to(torch.uint8)  # [..., rows, n, bytes of a code]
        streams = _by_stream(stored).flatten(-2)  # [..., blocks, n, 16, bytes of a stream]
        return streams.unflatten(-1, (-1, 4)).transpose(-3, -2).flatten(-3)

    def _unpack(self, packed: Tensor) -> Tensor:
        words = packed.unflatten(-1, (4 * self.bits, STREAMS, 4))
        streams = words.transpose(-3, -2).flatten(-2)  # [..., blocks, n, 16, bytes of a stream]
        stored = _by_row(streams.unflatten(-1, (ROWS_PER_STREAM, -1)))
        return (stored.long() << 8 * torch.arange(2 * self.bits, device=packed.device)).sum(-1)

    def _encode(self, values: Tensor) -> Tensor:
        target = (values.float() / (self.gain * self.unit)).round_().nan_to_num_(nan=0.0)
        target = target.clamp_(-LARGEST_TARGET, LARGEST_TARGET).to(torch.int16)
        streams = _by_stream(target)  # [..., blocks, n, 16, 8, 16 columns]
        symbols = self._paths(streams.reshape(-1, ROWS))
        symbols = symbols.reshape(*streams.shape[:-1], symbols.shape[-1] // ROWS_PER_STREAM)
        shifts = 16 * self.bits // symbols.shape[-1] * torch.arange(symbols.shape[-1], device=values.device)
        return _by_row((symbols.long() << shifts).sum(-1, keepdim=True)).squeeze(-1)

    def _decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        codes = codes.long()
        streams = codes.unflatten(-2, (-1, ROWS_PER_STREAM, STREAMS))
        states = self._states(streams, streams.roll(1, dims=-3))
        values = look_up(_values(codes.device, dtype, self), states.flatten())
        return values.reshape(*codes.shape, COLUMNS)

    @abstractmethod
    def points(self) -> Tensor:
        """y of every state: [65536, weights of a step] int16, computed anew."""

    @abstractmethod
    def _paths(self, targets: Tensor) -> Tensor:
        """Symbols of the steps, uint8 [n, steps], for targets int16 [n, 128]."""

    @abstractmethod
    def _states(self, codes: Tensor, before: Tensor) -> Tensor:
        """States of the steps of each code, given the code before it in its stream: [..., steps] int64."""


@dataclass(frozen=True)
class ByteTrellis(Trellis):
    """`bt`: a byte a step; the 16 bits of a state are hashed by two products to eight bytes."""

    family: ClassVar[str] = "bt"
    available_bits: ClassVar[tuple[int, ...]] = (2, 4)
    window: ClassVar[int] = 16

    @property
    def unit(self) -> int:
        return self.bits // 2

    @property
    def gain(self) -> float:
        return BYTE_GAINS[self.bits]

    @property
    def multipliers(self) -> tuple[int, ...]:
        return BYTE_MULTIPLIERS[self.bits]

    def points(self) -> Tensor:
        before, new = torch.arange(256).unsqueeze(1), torch.arange(256)
        first, second = self.multipliers
        new_first = (new | before << 8) * 0x10001 * first  # (b, a, b, a)
        old_first = (before | new << 8) * 0x10001 * second
        byte = 8 * torch.arange(4)
        sums = (new_first.unsqueeze(-1) >> byte & 255) + (old_first.unsqueeze(-1) >> byte & 255)  # [256, 256, 4]
        if self.bits == 2:
            y = sums - 255
        else:
            s0, s1, s2, s3 = sums.unbind(-1)
            y = torch.stack((s0 - s1 + s2 - s3, s0 + s1 - s2 - s3), dim=-1)
        return y.flatten(0, 1).to(torch.int16)

    def _paths(self, targets: Tensor) -> Tensor:
        points = _points(targets.device, torch.int16, self)
        half_norms = _half_norms(targets.device, torch.int32, self)
        steps = targets.unflatten(1, (-1, points.shape[1])).contiguous()
        return byte_path(points.view(256, 256, -1), half_norms.view(256, 256), steps, self.window)

    def _states(self, codes: Tensor, before: Tensor) -> Tensor:
        new = codes.unsqueeze(-1) >> 8 * torch.arange(2 * self.bits, device=codes.device) & 255
        last = before.unsqueeze(-1) >> 16 * self.bits - 8 & 255
        return torch.cat((last, new[..., :-1]), dim=-1) << 8 | new


@dataclass(frozen=True)
class BitTrellis(Trellis):
    """`tcq`: as many bits a step as a weight has; a state is hashed by one product to the sum of its four bytes."""

    family: ClassVar[str] = "tcq"
    available_bits: ClassVar[tuple[int, ...]] = (2, 3, 4)
    window: ClassVar[int] = 64

    @property
    def gain(self) -> float:
        return BIT_GAINS[self.bits]

    @property
    def multipliers(self) -> tuple[int, ...]:
        return (BIT_MULTIPLIERS[self.bits],)

    def points(self) -> Tensor:
        hashed = torch.arange(65536) * self.multipliers[0]
        return ((hashed.unsqueeze(-1) >> 8 * torch.arange(4) & 255).sum(-1, keepdim=True) - 510).to(torch.int16)

    def _paths(self, targets: Tensor) -> Tensor:
        points = _points(targets.device, torch.int16, self).view(-1)
        half_norms = _half_norms(targets.device, torch.int32, self)
        return bit_path(points, half_norms, targets.contiguous(), self.bits, self.window)

    def _states(self, codes: Tensor, before: Tensor) -> Tensor:
        states = []
        for step in range(COLUMNS):
            start = (step + 1) * self.bits - 16
            if start >= 0:
                states.append(codes >> start)
            else:
                states.append(codes << -start | before >> COLUMNS * self.bits + start & 2**-start - 1)
        return torch.stack(states, dim=-1) & 0xFFFF


def _by_stream(rows: Tensor) -> Tensor:
    """[..., rows, n, k] -> [..., blocks, n, 16 streams, 8 rows of a stream, k]."""
    return rows.unflatten(-3, (-1, ROWS_PER_STREAM, STREAMS)).movedim(-2, -4).transpose(-3, -2)


def _by_row(streams: Tensor) -> Tensor:
    """The inverse of `_by_stream`."""
    return streams.transpose(-3, -2).movedim(-4, -2).flatten(-5, -3)


@cached_table
def _points(book: Trellis) -> Tensor:
    """[65536, weights of a step] int16."""
    return book.points()


@cached_table
def _half_norms(book: Trellis) -> Tensor:
    """[65536] int32, in units of the targets."""
    return (book.points().long().square().sum(1) // (2 * book.unit)).to(torch.int32)


@cached_table
def _values(book: Trellis) -> Tensor:
    """[65536, weights of a step] float32."""
    return (book.points().double() * book.gain).float()
