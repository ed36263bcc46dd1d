"""The codebooks of bitsandbytes: its NF4 and its FP4, code by code and byte by byte.

In groups as long as its blocks, without rotations, and where rows are whole blocks, the codes of a matrix are the bytes
that bitsandbytes keeps of it, and the scales its `absmax`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_lrq.codebooks.base import cached_table, look_up
from hf_lrq.codebooks.scalar import NF_LEVELS, ScalarCodebook

# Of a code without its sign bit, which is the highest: two bits of exponent and one of mantissa, over the largest.
FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)


@dataclass(frozen=True)
class Blocks(ScalarCodebook):
    """Codes of 4 bits, two a byte, of which the first is in the high nibble; levels from -1 to 1.

    bitsandbytes takes the largest magnitude of a block as its scale, so that some weight is at an end of the levels.
    What is rounded here has the scale of its `rounding`.
    """

    available_bits: ClassVar[tuple[int, ...]] = (4,)
    grouped: ClassVar[bool] = True

    def pack(self, codes: Tensor) -> Tensor:
        """See `Codebook`."""
        return _swapped(super().pack(codes))

    def _unpack(self, packed: Tensor) -> Tensor:
        return super()._unpack(_swapped(packed))


@dataclass(frozen=True)
class BlockNormalFloat(Blocks):
    """`bnbnf`: the quantile-based levels of QLoRA (Dettmers et al., 2023, appendix E), ascending.

    >>> BlockNormalFloat(4).pack(torch.tensor([[0, 7, 15, 0, 0, 0, 0, 0]])).flatten().tolist()  # 0x07, 0xf0
    [7, 240, 0, 0]
    """

    family: ClassVar[str] = "bnbnf"

    @property
    def deviation(self) -> float:
        """See `Codebook`; of least squared error for a Gaussian, found numerically."""
        return 0.34927629

    @property
    def levels(self) -> tuple[float, ...]:
        return NF_LEVELS[self.bits]


@dataclass(frozen=True)
class BlockFloat(Blocks):
    """`bnbfp`: a sign, two bits of exponent and one of mantissa. Not ascending; codes 0 and 8 are both zero.

    >>> BlockFloat(4).encode(torch.tensor([[-1.0], [0.0], [0.3], [9.0]])).tolist()
    [11, 0, 4, 3]
    """

    family: ClassVar[str] = "bnbfp"

    @property
    def deviation(self) -> float:
        """See `Codebook`; of least squared error for a Gaussian, found numerically."""
        return 0.39007299

    @property
    def levels(self) -> tuple[float, ...]:
        return (*FP4_MAGNITUDES, *(-magnitude for magnitude in FP4_MAGNITUDES))

    def _nearest(self, x: Tensor) -> Tensor:
        place = torch.bucketize(x.squeeze(1).contiguous(), _ascending_midpoints(x.device, x.dtype, self))
        return look_up(_ascending_codes(x.device, torch.int64, self), place)


def _swapped(packed: Tensor) -> Tensor:
    """Both nibbles of each byte in the other's place."""
    return packed << 4 | packed >> 4


@cached_table
def _ascending_codes(book: ScalarCodebook) -> Tensor:
    """The codes in the order of their levels, [levels]; of equal levels the first."""
    first = {level: code for code, level in reversed(list(enumerate(book.levels)))}
    return torch.tensor([first[level] for level in sorted(first)])


@cached_table
def _ascending_midpoints(book: ScalarCodebook) -> Tensor:
    """Between neighbouring levels, [levels - 1]."""
    levels = torch.tensor(sorted(set(book.levels)), dtype=torch.float64)
    return (levels[1:] + levels[:-1]) / 2
