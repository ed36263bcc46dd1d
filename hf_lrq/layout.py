"""How one compressed matrix lies on disk: the names, shapes and dtypes of its tensors, and so its exact size.

Everything that has to agree on the format (the layer, the checkpoint checks, the size accounting) asks this file.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_lrq.checks import check_choice, check_integer, check_power_of_two, shown
from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import SpecError

FACTOR_BITS = (4, 8, 16)
MAX_RANK = MAX_GROUP = 65536
ROTATIONS = ("hadamard", "none", "trained")
FACTOR_NAMES = ("lr_L", "lr_R", "lr_L_scale", "lr_R_scale", "ft_L", "ft_R")
TENSOR_NAMES = ("weight", "scales", "rot_in", "rot_out", *FACTOR_NAMES)
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 4096  # Shorter transforms mix too few weights to be worth a pass: signs only.
MOST_SHARDS = 64  # Equal ones that are looked for; engines spread a layer over no more processes.

Side = Literal["out", "in"]  # Which features of a matrix are meant.
# Axes along the out and the in features, from the end; None: no axis. Those of scales depend on the codebook.
_AXES: dict[str, tuple[int | None, int | None]] = {
    "weight": (-3, -2),
    "rot_in": (None, -1),
    "rot_out": (-1, None),
    "lr_L": (-2, None),
    "lr_R": (None, -1),
    "lr_L_scale": (None, None),
    "lr_R_scale": (None, None),
    "ft_L": (-2, None),
    "ft_R": (None, -1),
}


@dataclass(frozen=True)
class TensorLayout:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes in the file, header excluded."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """The inference side of a `LayerSpec`: all that is needed to read one layer.

    Attributes:
        codebook: resolved codebook name, for example "bt2".
        rank: columns of L and rows of R before clamping to the matrix.
        factor_bits: 16 (float16), 8 (int8 with one scale per rank) or 4 (two codes per byte along the rank axis).
        group_size: columns that share a scale, for codebooks with group scales.
        rotation: "hadamard", "none", or "trained": as "hadamard", with rotations that need not be signs any more.
        rotation_block: largest Hadamard block.
        ft_rank: columns of ft_L and rows of ft_R before clamping: a second pair, in float16, that holds what was merged
            into a layer whose L and R are codes; 0 is none.

    Raises:
        SpecError: if a field has a value that the format does not allow.
    """

    codebook: str
    rank: int
    factor_bits: int = 16
    group_size: int = 128
    rotation: str = "hadamard"
    rotation_block: int = 256
    ft_rank: int = 0

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 0, MAX_RANK)
        check_integer("ft_rank", self.ft_rank, 0, MAX_RANK)
        check_choice("factor_bits", self.factor_bits, FACTOR_BITS)
        check_integer("group_size", self.group_size, 8, MAX_GROUP, multiple_of=8)
        check_choice("rotation", self.rotation, ROTATIONS)
        check_power_of_two("rotation_block", self.rotation_block, SMALLEST_BLOCK, LARGEST_BLOCK)
        if not isinstance(self.codebook, str):
            raise SpecError(f"codebook must be a name, got {shown(self.codebook)}.")
        get_codebook(self.codebook)

    def clamped_rank(self, out_features: int, in_features: int) -> int:
        """The rank stored for an [out, in] matrix: never more than min(out, in)."""
        return min(self.rank, out_features, in_features)

    def tensors(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        """Name -> layout of every stored tensor of an [out, in] matrix, bias excluded."""
        book = get_codebook(self.codebook)
        groups = () if not book.grouped else (-(-in_features // self.group_size),)
        stored = {
            "weight": TensorLayout(book.packed_shape(out_features, in_features), torch.uint8),
            "scales": TensorLayout((out_features, *groups), torch.float16),
        }
        if self.rotation != "none":
            stored["rot_in"] = TensorLayout((in_features,), torch.float16)
            stored["rot_out"] = TensorLayout((out_features,), torch.float16)
        rank = self.clamped_rank(out_features, in_features)
        if rank:
            stored |= self._factors(out_features, in_features, rank)
        if self.ft_rank:
            rank = min(self.ft_rank, out_features, in_features)
            stored["ft_L"] = TensorLayout((out_features, rank), torch.float16)
            stored["ft_R"] = TensorLayout((rank, in_features), torch.float16)
        return stored

    def _factors(self, out_features: int, in_features: int, rank: int) -> dict[str, TensorLayout]:
        if self.factor_bits == 16:
            return {
                "lr_L": TensorLayout((out_features, rank), torch.float16),
                "lr_R": TensorLayout((rank, in_features), torch.float16),
            }
        stored_rank = rank if self.factor_bits == 8 else -(-rank // 2)
        dtype = torch.int8 if self.factor_bits == 8 else torch.uint8
        return {
            "lr_L": TensorLayout((out_features, stored_rank), dtype),
            "lr_R": TensorLayout((stored_rank, in_features), dtype),
            "lr_L_scale": TensorLayout((rank,), torch.float16),
            "lr_R_scale": TensorLayout((rank,), torch.float16),
        }

    # Shards: parts of the out features give parts of y, parts of the in features give summands of y (the bias is one
    # more). Their factors keep all ranks, also where a layer of their size would be clamped to fewer.

    def shard_axis(self, name: str, side: Side) -> int | None:
        """Axis of a stored tensor along the features, from the end; None where each shard needs the whole tensor."""
        grouped = get_codebook(self.codebook).grouped
        axes = ((-2, -1) if grouped else (-1, None)) if name == "scales" else _AXES[name]
        return axes[0 if side == "out" else 1]

    def shard_unit(self, side: Side, features: int) -> int:
        """The matrix can be cut at multiples of this many features, with no block of codes, scales or rotation cut."""
        book = get_codebook(self.codebook)
        unit = book.row_block if side == "out" else book.column_block
        if side == "in" and book.grouped:
            unit = math.lcm(unit, self.group_size)
        return unit if self.rotation == "none" else math.lcm(unit, hadamard_block(features, self.rotation_block))

    def shard_counts(self, side: Side, features: int) -> tuple[int, ...]:
        """Numbers of equal shards, at most `MOST_SHARDS`, that the features can be cut into; the first is 1.

        >>> LayerLayout(codebook="bt2", rank=0).shard_counts("out", 14336)
        (1, 2, 4, 7, 8, 14, 28, 56)
        """
        # Shards of whole units are rotated in blocks of the same length as the whole.
        units = features // self.shard_unit(side, features) if features % self.shard_unit(side, features) == 0 else 1
        return tuple(count for count in range(1, min(units, MOST_SHARDS) + 1) if units % count == 0)

    def check_shard(self, side: Side, features: int, start: int, stop: int) -> None:
        """Whether the features from `start` to `stop` of a matrix of so many are computed exactly on their own.

        Raises:
            SpecError: if they are not.
        """
        if not 0 <= start < stop <= features:
            raise SpecError(f"a shard of {features} {side} features cannot be {start} to {stop}.")
        unit = self.shard_unit(side, features)
        if start % unit or (stop % unit and stop < features):
            raise SpecError(
                f"{side} features {start} to {stop} of {features} are no multiples of {unit}, where {self.codebook!r} "
                f"with rotation_block {self.rotation_block} can be cut. Use fewer shards, or smaller blocks; "
                f"{self._what_fits(side, features)}"
            )
        whole, own = (hadamard_block(n, self.rotation_block) for n in (features, stop - start))
        if self.rotation != "none" and whole != own:
            raise SpecError(
                f"{features} {side} features are rotated in blocks of {whole}; {stop - start} of them alone would be "
                f"rotated in blocks of {own}. Use shards of another size, or compress with a smaller rotation_block; "
                f"{self._what_fits(side, features)}"
            )

    def _what_fits(self, side: Side, features: int) -> str:
        _, *counts = self.shard_counts(side, features)
        listed = ", ".join(f"{count} of {features // count}" for count in counts)
        return f"equal shards that fit: {listed or 'none'}."

    def shard(self, name: str, tensor: Tensor, side: Side, features: int, start: int, stop: int) -> Tensor:
        """What the shard with the features from `start` to `stop` needs of a stored tensor: a view of it.

        Args:
            name: of the tensor, see `tensors`.
            tensor: of the whole matrix; may have further axes in front, as those of experts.
            side: which features are cut.
            features: of the whole matrix, on that side.
            start, stop: see `check_shard`.

        Raises:
            SpecError: see `check_shard`.
        """
        self.check_shard(side, features, start, stop)
        axis = self.shard_axis(name, side)
        if axis is None:
            return tensor
        first, end = (self._stored(name, side, feature) for feature in (start, stop))
        return tensor.narrow(axis, first, end - first)

    def _stored(self, name: str, side: Side, features: int) -> int:
        """Length of a stored tensor along so many features."""
        if name == "weight":
            return get_codebook(self.codebook).packed_shape(features, features)[0 if side == "out" else 1]
        return -(-features // self.group_size) if name == "scales" and side == "in" else features

    def bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of all tensors of an [out, in] matrix, padding, scales, rotations and factors included."""
        return sum(tensor.bytes for tensor in self.tensors(out_features, in_features).values())

    def factor_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of the factors of an [out, in] matrix and of their scales."""
        tensors = self.tensors(out_features, in_features)
        return sum(tensor.bytes for name, tensor in tensors.items() if name in FACTOR_NAMES)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """True bits per weight of an [out, in] matrix: everything stored, over out * in."""
        return 8 * self.bytes(out_features, in_features) / (out_features * in_features)


def hadamard_block(n: int, largest: int) -> int:
    """Length of the Hadamard blocks of an axis of n: the largest power of two dividing n, at most `largest`.

    1 (signs only) where that is below 8.

    >>> hadamard_block(1536, 256), hadamard_block(96, 256), hadamard_block(100, 256)
    (256, 32, 1)
    """
    block = min(n & -n, largest)
    return block if block >= SMALLEST_BLOCK else 1
