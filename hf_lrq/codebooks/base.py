"""The codebook interface: a finite set of points for weights of known variance, and the nearest-point map onto it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar, Concatenate, ParamSpec

import torch
from torch import Tensor

from hf_lrq.codebooks.packing import TILE, pack_rows, unpack_rows
from hf_lrq.errors import SpecError
from hf_lrq.numerics import full_precision

P = ParamSpec("P")
BITS = (1, 8)  # The smallest and the largest number of bits per weight.


@dataclass(frozen=True)
class Codebook(ABC):
    """A finite set of points in R^dim, scaled for inputs of unit variance, or that of `deviation`.

    A codebook knows nothing of row scales, Grams or layers. The points that `decode` returns are the format: they
    never change within a format version.

    Most codebooks code each vector on its own. A trellis codes `row_block` rows of a column block together, and what a
    code means depends on those of other rows: then the axis before that of the vectors is the rows, a multiple of
    `row_block`.

    Attributes:
        bits: bits per weight, one of `available_bits`.
        family: name of the family, for example "e8p".
        dim: weights per code, consecutive columns of a row.
        row_block: rows that are coded together.
        column_block: columns of a matrix are padded to a multiple of it.
        available_bits: the bits per weight that this family comes in.
        grouped: whether a row carries one scale per group of columns rather than one in all.
        deviation: standard deviation of the weights that its points suit best; 1 unless they have to be whole numbers.

    Raises:
        SpecError: if the family does not come in `bits`.
    """

    bits: int

    family: ClassVar[str]
    dim: ClassVar[int]
    available_bits: ClassVar[tuple[int, ...]]
    row_block: ClassVar[int] = 1
    column_block: ClassVar[int] = TILE
    grouped: ClassVar[bool] = False

    @property
    def deviation(self) -> float:
        """See the class."""
        return 1.0

    def __post_init__(self) -> None:
        if self.bits not in self.available_bits:
            allowed = ", ".join(map(str, self.available_bits))
            raise SpecError(
                f"Codebook family {self.family!r} has no {self.bits}-bit codebook. Choose bits from: {allowed}."
            )

    @property
    def name(self) -> str:
        """Family and bits, for example "e8p2"."""
        return f"{self.family}{self.bits}"

    def encode(self, values: Tensor) -> Tensor:
        """Code of the nearest point of each vector; residual codebooks are nearest stage by stage.

        Args:
            values: [..., dim], or [..., rows, n, dim] where rows are coded together; floating, finite, about
                `deviation` in standard deviation. Computed in float32.

        Returns:
            [...] int64 codes. Equal inputs give equal codes; a NaN gives an unspecified valid code.

        Raises:
            ValueError: if the last axis is not `dim` long, the rows are no multiple of `row_block`, or the values are
                not floating.
        """
        if not values.is_floating_point():
            raise ValueError(
                f"Codebook {self.name!r} encodes floating values, got {values.dtype}. Convert with .float()."
            )
        if values.ndim == 0 or values.shape[-1] != self.dim:
            raise ValueError(
                f"Codebook {self.name!r} encodes vectors of {self.dim}, got values of shape {tuple(values.shape)}. "
                f"Reshape to [..., {self.dim}], padding with zeros."
            )
        self._check_rows(values.shape[:-1])
        return self._encode(values.detach())

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The points of codes; exact in float32, rounded once to `dtype`.

        Args:
            codes: [...] integers in [0, 2**(bits * dim)), or [..., rows, n] where rows are coded together.
            dtype: dtype of the result.

        Returns:
            [..., dim] values.

        Raises:
            IndexError: if a code is out of range (on a CPU; an assertion of the device elsewhere). A trellis gives any
                bits a meaning and reads no others.
            ValueError: if the rows are no multiple of `row_block`.
        """
        self._check_rows(codes.shape)
        return self._decode(codes, dtype)

    def decode_packed(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The points of stored bytes, [..., rows, columns] padding included; see `unpack` and `decode`."""
        return self.decode(self.unpack(packed), dtype).flatten(-2)

    def pool_rows(self, values: Tensor) -> Tensor:
        """Sums of values [rows, n] over the rows that share a sequence of codes, at each of those rows."""
        return values

    def packed_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """Shape of the stored codes of an [out, in] matrix, padding included."""
        return out_features, -(-in_features // TILE), self.bits

    def pack(self, codes: Tensor) -> Tensor:
        """Codes of a matrix [..., rows, n], padded, as stored bytes; see `packed_shape`."""
        return pack_rows(codes, self.bits, self.dim)

    def unpack(self, packed: Tensor) -> Tensor:
        """Codes of all tiles, padding included; the inverse of `pack`.

        Args:
            packed: [..., tiles, bits] uint8; see `packed_shape`.

        Returns:
            [..., rows, n] int64.

        Raises:
            ValueError: if `packed` is not uint8 or its last axis has another length.
        """
        self._check_packed(packed)
        return self._unpack(packed)

    def _check_packed(self, packed: Tensor) -> None:
        width = self.packed_shape(1, 1)[-1]
        if packed.dtype != torch.uint8 or packed.shape[-1:] != (width,):
            raise ValueError(
                f"Codes of codebook {self.name!r} are stored as torch.uint8 [..., tiles, {width}], "
                f"got {packed.dtype} {list(packed.shape)}. Check the codebook that the config of the checkpoint names."
            )

    def _unpack(self, packed: Tensor) -> Tensor:
        return unpack_rows(packed, self.bits, self.dim)

    def _check_rows(self, shape: torch.Size) -> None:
        """Whether [..., rows, n] has whole blocks of rows."""
        if self.row_block > 1 and (len(shape) < 2 or shape[-2] % self.row_block):
            raise ValueError(
                f"Codebook {self.name!r} codes {self.row_block} rows together, got {tuple(shape)} as [..., rows, n]. "
                "Pad the rows with zeros."
            )

    @abstractmethod
    def _encode(self, values: Tensor) -> Tensor:
        """[..., dim] floating -> [...] int64."""

    @abstractmethod
    def _decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] integers -> [..., dim]."""


@dataclass(frozen=True)
class VectorCodebook(Codebook):
    """A codebook that codes each vector on its own.

    Attributes:
        chunk: vectors encoded at a time; bounds the memory for intermediates.
    """

    chunk: ClassVar[int] = 1 << 18

    def _encode(self, values: Tensor) -> Tensor:
        vectors = values.reshape(-1, self.dim)
        parts = [self._nearest(part.float()) for part in torch.split(vectors, self.chunk)]
        codes = parts[0] if len(parts) == 1 else torch.cat(parts)
        return codes.reshape(values.shape[:-1])

    def _decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self._points(codes.reshape(-1), dtype).reshape(*codes.shape, self.dim)

    @abstractmethod
    def _nearest(self, x: Tensor) -> Tensor:
        """[n, dim] float32 -> [n] int64."""

    @abstractmethod
    def _points(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """[n] integers -> [n, dim]."""


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """Rows of `table` [size, ...] at `codes` [n]: [n, ...]."""
    return table.index_select(0, codes.long())


def cached_table(build: Callable[P, Tensor]) -> Callable[Concatenate[torch.device, torch.dtype, P], Tensor]:
    """Make `build`, which returns a constant CPU tensor, into a cached function of (device, dtype, *its arguments).

    Built on first use, never at import. Two threads may both build a table: they are equal and the last one stays.
    """
    cache: dict[Hashable, Tensor] = {}

    def table(device: torch.device, dtype: torch.dtype, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        key = (device, dtype, *args, *kwargs.items())
        found = cache.get(key)
        if found is None:
            # The table outlives the caller's inference mode, default device and other settings.
            with torch.inference_mode(False), full_precision(torch.device("cpu")):
                found = build(*args, **kwargs).to(device=device, dtype=dtype)
            # Under a tensor mode (fake tensors and the like) it must not outlive that mode.
            if type(found) is Tensor:
                cache[key] = found
        return found

    return table
