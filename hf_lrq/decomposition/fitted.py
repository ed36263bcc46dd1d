"""Nearest rounding with the scale that suits each group: for tables of embeddings, where no Gram says what counts."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_lrq.decomposition.quantizers import RoundToNearest, representable
from hf_lrq.errors import SpecError
from hf_lrq.matrices import QuantizedMatrix

ROWS = 4096  # Worked on at a time; bounds the memory for intermediates.
# Largest level, as fractions of the largest magnitude: the first, the last, and how many. With many levels (from 5 bits
# on) clipping loses more than it gains, as in `matrices.quantize_factor`.
FEW_LEVELS, MANY_LEVELS = (1.0, 0.5, 21), (1.0, 0.8, 5)


@dataclass(frozen=True)
class FittedNearest(RoundToNearest):
    """Rounds every weight to the nearest level; the scale of a group is that of least squared error among some.

    One of them is the root mean square, which other quantizers take: it suits Gaussian weights, as rotations make them.
    Tables of embeddings are not rotated.

    Raises:
        SpecError: if the codebook has no group scales.
        CompressionError: if a scale is too large for float16.
    """

    def __post_init__(self) -> None:
        if not self.book.grouped:
            raise SpecError(f"rounding 'fitted' is for codebooks with group scales (int), got {self.codebook!r}.")

    def quantize(self, W: Tensor, H: Tensor) -> QuantizedMatrix:
        """Nearest codes of W / scale."""
        return QuantizedMatrix.stacked([super(FittedNearest, self).quantize(part, H) for part in W.split(ROWS)])

    def scales(self, W: Tensor) -> Tensor:
        """The scale of each group [out, groups], in float32 values that float16 can hold."""
        groups = pad(W, (0, -W.shape[1] % self.group_size)).unflatten(1, (-1, self.group_size))
        peak = groups.abs().amax(2) / self.book.decode(torch.arange(2**self.book.bits)).max().item()
        best = super().scales(W)
        least = self._error(groups, best)
        for fraction in torch.linspace(*(FEW_LEVELS if self.book.bits < 5 else MANY_LEVELS)).tolist():
            scale = representable(peak * fraction)
            error = self._error(groups, scale)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best

    def _error(self, groups: Tensor, scale: Tensor) -> Tensor:
        """Squared error of each group; zeros, as those that pad the last one, are taken for exact."""
        inverse = torch.where(scale > 0, 1 / scale, 1.0).unsqueeze(2)
        rounded = self.book.decode(self.book.encode((groups * inverse).unsqueeze(3))).squeeze(3) * scale.unsqueeze(2)
        return torch.where(groups == 0, 0.0, groups - rounded).square().sum(2)
