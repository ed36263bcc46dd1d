"""The value types that travel between the layers of the package: what was computed, not how."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.decoding import decode_rows

Pair = tuple[Tensor, Tensor]  # Float L [out, r] and R [r, in]; a `LowRank` is what is stored of one.


def expand_scales(scales: Tensor, group_size: int, columns: int) -> Tensor:
    """Scales as a factor of [out, columns] values: [out] -> [out, 1]; [out, groups] -> [out, columns]."""
    if scales.ndim == 1:
        return scales.unsqueeze(1)
    return scales.repeat_interleave(group_size, dim=1)[:, :columns]


def times_scales(values: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Values [out, columns] times the scales of their rows [out] or groups [out, groups]."""
    if scales.ndim == 2 and values.shape[1] % group_size == 0:
        # The same without a copy of the scales for each weight.
        return (values.unflatten(1, (-1, group_size)) * scales.unsqueeze(2)).flatten(1)
    return values * expand_scales(scales, group_size, values.shape[1])


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """Q: codes of a named codebook times scales.

    Attributes:
        packed: uint8, see `Codebook.packed_shape`.
        scales: [out] or, for grouped codebooks, [out, groups]; multiplies the decoded unit-variance values.
        codebook: name, for example "e8p2".
        in_features: columns without padding.
        group_size: columns per group; only read where scales has groups.
    """

    packed: Tensor
    scales: Tensor
    codebook: str
    in_features: int
    group_size: int = 128

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, codebook: str, in_features: int, group_size: int
    ) -> "QuantizedMatrix":
        """From unpacked codes [padded rows, padded columns / dim]."""
        return cls(get_codebook(codebook).pack(codes), scales, codebook, in_features, group_size)

    @classmethod
    def stacked(cls, parts: Sequence["QuantizedMatrix"]) -> "QuantizedMatrix":
        """Matrices of one kind above each other; all but the last have a multiple of the `row_block` of rows."""
        packed, scales = (torch.cat(each) for each in zip(*((part.packed, part.scales) for part in parts), strict=True))
        return replace(parts[0], packed=packed, scales=scales)

    def part(self, start: int, stop: int) -> "QuantizedMatrix":
        """Some of the rows, as a matrix of their own; `start` is a multiple of the codebook's `row_block`."""
        block = get_codebook(self.codebook).row_block
        return replace(self, packed=self.packed[start // block : -(-stop // block)], scales=self.scales[start:stop])

    @property
    def out_features(self) -> int:
        """Rows without padding."""
        return self.scales.shape[0]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] values; computed in float32, cast once. This is the definition every kernel is held to."""
        return self.rows(0, self.out_features, dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of `dequantize`; `start` is a multiple of the codebook's `row_block`."""
        values = decode_rows(self.packed, self.codebook, self.in_features, start, stop)
        return times_scales(values, self.scales[start:stop].float(), self.group_size).to(dtype)


@dataclass(frozen=True, eq=False)
class Factor:
    """L [out, r] or R [r, in], as stored: float16, or codes with one scale per rank.

    Attributes:
        data: float16 values; int8 codes; or uint8, two 4-bit codes per byte along the rank axis (low nibble first,
            code c means c - 8).
        scale: [r] float16, or None for float data.
        rank_dim: 1 for L, 0 for R.
        rank: number of ranks, padding excluded.
    """

    data: Tensor
    scale: Tensor | None
    rank_dim: int
    rank: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, [out, r] or [r, in]."""
        return dense_factor(self.data, self.scale, self.rank_dim).to(dtype)


def dense_factor(data: Tensor, scale: Tensor | None, rank_dim: int) -> Tensor:
    """Values of a stored factor: float data as it is, codes times their scale in float32."""
    if scale is None:
        return data
    codes = data
    if data.dtype == torch.uint8:
        nibbles = torch.stack((data & 15, data >> 4), dim=rank_dim + 1 if rank_dim else 1)
        codes = nibbles.flatten(rank_dim, rank_dim + 1).narrow(rank_dim, 0, len(scale)).to(torch.int8) - 8
    return codes.float() * (scale.float().unsqueeze(1) if rank_dim == 0 else scale.float())


def quantize_factor(values: Tensor, bits: int, rank_dim: int) -> Factor:
    """Store a factor: float16, or symmetric integer codes with the scale of least squared error per rank.

    Args:
        values: [out, r] (rank_dim 1) or [r, in] (rank_dim 0) float.
        bits: 16, 8 or 4.
        rank_dim: the axis of the ranks.
    """
    rank = values.shape[rank_dim]
    if bits == 16:
        return Factor(values.to(torch.float16), None, rank_dim, rank)
    rows = values.float() if rank_dim == 0 else values.float().T  # [r, length]
    codes, scale = _round_rows(rows, largest=2 ** (bits - 1) - 1)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, rank % 2)) + 8
        codes = (codes[0::2] | codes[1::2] << 4).to(torch.uint8)
    data = codes if rank_dim == 0 else codes.T
    return Factor(data.to(torch.uint8 if bits == 4 else torch.int8).contiguous(), scale, rank_dim, rank)


def _round_rows(rows: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes in [-largest, largest], int64 [r, length], and float16 scales [r]."""
    peak = rows.abs().amax(1) / largest
    best_error = torch.full_like(peak, torch.inf)
    best = torch.zeros_like(peak)
    # With few levels it pays to clip the tails: 4 bits gain a quarter of the squared error, 8 bits next to nothing.
    for shrink in torch.linspace(1.0, 0.5, 21 if largest < 16 else 5).tolist():
        scale = _representable(peak * shrink)
        error = (rows - _codes(rows, scale, largest) * scale[:, None]).square().sum(1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return _codes(rows, best, largest).long(), best.to(torch.float16)


def _representable(scale: Tensor) -> Tensor:
    """Scales as float16 will store them; zero rows get the smallest normal number so that nothing divides by zero."""
    return scale.clamp(min=torch.finfo(torch.float16).tiny).to(torch.float16).float()


def _codes(rows: Tensor, scale: Tensor, largest: int) -> Tensor:
    return (rows / scale[:, None]).round().clamp(-largest, largest)


@dataclass(frozen=True, eq=False)
class LowRank:
    """L R, as stored.

    Attributes:
        L: [out, r].
        R: [r, in].
    """

    L: Factor
    R: Factor

    @property
    def rank(self) -> int:
        """Number of ranks."""
        return self.L.rank

    def dense(self) -> Tensor:
        """L R, [out, in] float32."""
        return self.L.dense() @ self.R.dense()

    @classmethod
    def zero(cls, out_features: int, in_features: int, device: torch.device | None = None) -> "LowRank":
        """The product of rank 0."""
        return cls(
            Factor(torch.zeros(out_features, 0, dtype=torch.float16, device=device), None, 1, 0),
            Factor(torch.zeros(0, in_features, dtype=torch.float16, device=device), None, 0, 0),
        )
