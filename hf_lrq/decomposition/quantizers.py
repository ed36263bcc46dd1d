"""From a full-precision matrix to codes: nearest rounding, and adaptive rounding with linear feedback (LDLQ)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_lrq.codebooks import Codebook, get_codebook
from hf_lrq.errors import CompressionError
from hf_lrq.matrices import QuantizedMatrix, expand_scales

PANEL = 128  # Columns between two updates of everything to the right; wide enough that those are efficient products.
SMALLEST_RIDGE, LARGEST_RIDGE = 1e-3, 1e3  # On an indefinite Gram, as fractions of its mean diagonal.


@dataclass(frozen=True)
class Quantizer(ABC):
    """Maps a weight and the Gram of its error to codes.

    Attributes:
        codebook: name.
        group_size: columns that share a scale, for grouped codebooks.
        feeds_back: whether errors of some weights are fed into others.
    """

    codebook: str
    group_size: int = 128

    feeds_back: ClassVar[bool] = True

    @abstractmethod
    def quantize(self, W: Tensor, H: Tensor) -> QuantizedMatrix:
        """Round W [out, in] so that tr((W - Q) H (W - Q)^T) is small; H [in, in] is positive definite."""

    @abstractmethod
    def refine(self, W: Tensor, H: Tensor, previous: QuantizedMatrix) -> QuantizedMatrix:
        """Improve codes that were found for a slightly different W or H; the loss does not rise."""

    def zero(self, W: Tensor) -> QuantizedMatrix:
        """Q = 0 of the shape of W: any codes, and scales of zero."""
        packed = torch.zeros(self.book.packed_shape(*W.shape), dtype=torch.uint8, device=W.device)
        scales = self.scales(torch.zeros_like(W)).to(torch.float16)
        return QuantizedMatrix(packed, scales, self.codebook, W.shape[1], self.group_size)

    @property
    def book(self) -> Codebook:
        """The codebook itself."""
        return get_codebook(self.codebook)

    def scales(self, W: Tensor) -> Tensor:
        """What the weights of each row [out], or of each group [out, groups], are divided by.

        It is their root mean square over the deviation that suits the codebook, in float32 values float16 can hold.
        """
        if not self.book.grouped:
            return representable(W.square().mean(1).sqrt() / self.book.deviation)
        padding = -W.shape[1] % self.group_size
        squares = torch.nn.functional.pad(W.square(), (0, padding)).unflatten(1, (-1, self.group_size)).sum(-1)
        counts = torch.full((squares.shape[1],), float(self.group_size), device=W.device)
        counts[-1] -= padding
        return representable((squares / counts).sqrt() / self.book.deviation)

    def finish(self, codes: Tensor, scales: Tensor, in_features: int) -> QuantizedMatrix:
        """Pack [padded out, padded in / dim] codes; scales are those of the rows without padding."""
        return QuantizedMatrix.from_codes(codes, scales.to(torch.float16), self.codebook, in_features, self.group_size)

    def pad(self, W: Tensor) -> Tensor:
        """W with zero rows and columns up to whole blocks of the codebook."""
        return torch.nn.functional.pad(W, (0, -W.shape[1] % self.book.column_block, 0, -len(W) % self.book.row_block))

    def pad_gram(self, H: Tensor) -> Tensor:
        """Padding columns carry no weight and are coupled to nothing."""
        padding = -len(H) % self.book.column_block
        if not padding:
            return H
        padded = torch.nn.functional.pad(H, (0, padding, 0, padding))
        padded.diagonal()[len(H) :] = H.diagonal().mean()
        return padded


def representable(scales: Tensor) -> Tensor:
    """What float16 storage makes of the scales. A zero row keeps scale 0: no codebook need have a point at zero.

    Raises:
        CompressionError: if one is too large for float16.
    """
    stored = scales.to(torch.float16).float()
    if torch.isinf(stored).any():
        raise CompressionError(
            f"a row of the weight needs a scale of {scales.max().item():.3g}; scales are stored in float16, "
            f"which ends at {torch.finfo(torch.float16).max:g}. Rescale the layer, or leave it out with "
            "modules_to_not_convert."
        )
    return stored


def _divide(values: Tensor, scales: Tensor) -> Tensor:
    """values / scales, and values as they are where the scale is zero."""
    return values / _divisors(scales)


def _divisors(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, 1.0)


@dataclass(frozen=True)
class RoundToNearest(Quantizer):
    """Rounds every vector of weights on its own; ignores the Gram."""

    feeds_back: ClassVar[bool] = False

    def quantize(self, W: Tensor, H: Tensor) -> QuantizedMatrix:
        """Nearest codes of W / scale."""
        scales = self.scales(W)
        target = self.pad(_divide(W, expand_scales(scales, self.group_size, W.shape[1])))
        codes = self.book.encode(target.unflatten(1, (-1, self.book.dim)))
        return self.finish(codes, scales, W.shape[1])

    def refine(self, W: Tensor, H: Tensor, previous: QuantizedMatrix) -> QuantizedMatrix:
        """Nothing: nearest rounding ignores H by definition."""
        return previous


@dataclass(frozen=True)
class LDLQ(Quantizer):
    """Rounds column blocks left to right, feeding each block's error into the next (QuIP, 2023; in blocks:
    QuIP#, 2024).

    With H = U D U^T, U unit upper triangular in blocks, the loss is the sum over blocks of |(W - Q) U_k|^2_{D_k}; so
    block k is rounded from W_k + (W_<k - Q_<k) U_<k,k. Blocks are as wide as the codebook's vectors.

    Attributes:
        sweeps: guarded Gauss-Seidel passes afterwards. A sweep visits every block again, with all others fixed, and
            keeps the new code of a row (of the rows that are coded together) only if their loss falls; so the loss
            never rises (the unguarded sweeps of QuIP# can raise it). Each sweep starts with the scales refitted by
            least squares.
    """

    sweeps: int = 0

    def quantize(self, W: Tensor, H: Tensor) -> QuantizedMatrix:
        """Adaptive rounding of W [out, in] under H [in, in]."""
        padded_W, padded_H = self.pad(W), self.pad_gram(H)
        scales = self._pad_scales(self.scales(W))
        codes, rounded = _feedback_pass(padded_W, unit_upper(padded_H, self.book.dim), self._grid(scales, padded_W))
        for _ in range(self.sweeps):
            scales, codes, rounded = self._sweep(padded_W, padded_H, scales, codes, rounded)
        if self.sweeps and scales.ndim == 1:
            scales, _ = refit_scales(padded_W, rounded, rounded @ padded_H, scales)
        return self.finish(codes, scales[: len(W)], W.shape[1])

    def refine(self, W: Tensor, H: Tensor, previous: QuantizedMatrix) -> QuantizedMatrix:
        """One guarded sweep from the codes at hand."""
        padded_W, padded_H = self.pad(W), self.pad_gram(H)
        scales, codes = self._pad_scales(previous.scales.float()), self.book.unpack(previous.packed)
        rounded = self._grid(scales, padded_W).values(codes)
        scales, codes, rounded = self._sweep(padded_W, padded_H, scales, codes, rounded)
        if scales.ndim == 1:
            scales, _ = refit_scales(padded_W, rounded, rounded @ padded_H, scales)
        return self.finish(codes, scales[: len(W)], W.shape[1])

    def _pad_scales(self, scales: Tensor) -> Tensor:
        return torch.nn.functional.pad(scales, (0, 0) * (scales.ndim - 1) + (0, -len(scales) % self.book.row_block))

    def _sweep(
        self, W: Tensor, H: Tensor, scales: Tensor, codes: Tensor, rounded: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        weighted = rounded @ H
        if scales.ndim == 1:
            scales, factor = refit_scales(W, rounded, weighted, scales)
            rounded, weighted = rounded * factor, weighted * factor
        return scales, *_guarded_sweep(W @ H - weighted, H, self._grid(scales, W), codes, rounded)

    def _grid(self, scales: Tensor, W: Tensor) -> "_Grid":
        n = W.shape[1]
        each = [expand_scales(part, self.group_size, n).expand(-1, n) for part in (scales, _divisors(scales))]
        return _Grid(self.book, *each)


@dataclass(frozen=True, eq=False)
class _Grid:
    """The codebook stretched by the scales of each row and column."""

    book: Codebook
    scales: Tensor  # [out, padded in]
    divisors: Tensor  # [out, padded in]; 1 where the scale is zero

    def round(self, target: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Codes [out, width / dim] and values [out, width] nearest to target [out, width]."""
        codes = self.book.encode((target / self.divisors[:, columns]).unflatten(1, (-1, self.book.dim)))
        return codes, self.book.decode(codes, target.dtype).flatten(-2) * self.scales[:, columns]

    def values(self, codes: Tensor) -> Tensor:
        """Values [out, padded in] of all codes."""
        return self.book.decode(codes, self.scales.dtype).flatten(-2) * self.scales


def unit_upper(H: Tensor, block: int) -> Tensor:
    """The block-unit upper-triangular U of H = U D U^T, D block-diagonal with `block` x `block` blocks.

    H may be indefinite by rounding errors, as a marginalised Gram is where one direction holds nearly all the energy;
    then U is that of H with the least ridge 1e-3, 1e-2, ... of its mean diagonal that makes it definite. U only guides
    the rounding; the loss that counts is measured under the Gram itself.
    """
    C = upper_cholesky(H)
    if block == 1:
        return C / C.diagonal()
    n = len(H)
    diagonal = torch.stack([C[k : k + block, k : k + block] for k in range(0, n, block)])  # [n / block, block, block]
    columns = C.unflatten(1, (-1, block)).transpose(0, 1)  # [n / block, n, block]
    return torch.linalg.solve_triangular(diagonal, columns, upper=True, left=False).transpose(0, 1).flatten(1)


def upper_cholesky(H: Tensor) -> Tensor:
    """Upper-triangular C of C C^T = H [n, n], with a ridge where H needs one."""
    H = H.flip(0, 1)
    C, info = torch.linalg.cholesky_ex(H)
    ridge = SMALLEST_RIDGE
    while info.item() and ridge <= LARGEST_RIDGE:
        raised = H.clone()
        raised.diagonal().add_(ridge * H.diagonal().mean())
        C, info = torch.linalg.cholesky_ex(raised)
        ridge *= 10
    assert not info.item(), "a Gram is definite up to rounding errors"
    return C.flip(0, 1)


def _feedback_pass(W: Tensor, U: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """LDLQ proper: codes [out, in / dim] and values [out, in]."""
    dim, n = grid.book.dim, W.shape[1]
    target = W.clone()  # W plus the feedback of all finished panels
    rounded = torch.empty_like(W)
    codes = torch.empty(W.shape[0], n // dim, dtype=torch.long, device=W.device)
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        error = W.new_empty(W.shape[0], stop - start)
        for k in range(start, stop, dim):
            block, done = slice(k, k + dim), k - start
            here = target[:, block]
            if done:
                here = here + error[:, :done] @ U[start:k, block]
            new_codes, values = grid.round(here, block)
            codes[:, k // dim : k // dim + 1] = new_codes
            rounded[:, block] = values
            torch.sub(W[:, block], values, out=error[:, done : done + dim])
        target[:, stop:].addmm_(error, U[start:stop, stop:])
    return codes, rounded


def _guarded_sweep(slope: Tensor, H: Tensor, grid: _Grid, codes: Tensor, rounded: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of coordinate descent over blocks; the block of a row moves only where that lowers the loss.

    Rows that are coded together move together.

    Args:
        slope: (W - rounded) H, [out, in]: minus half the gradient of the loss.
        H, grid: see `LDLQ`.
        codes, rounded: where to start; not changed.
    """
    dim, n = grid.book.dim, rounded.shape[1]
    codes, rounded, slope = codes.clone(), rounded.clone(), slope.clone()
    starts = range(0, n, dim)
    inverse = torch.linalg.inv(torch.stack([H[k : k + dim, k : k + dim] for k in starts]))
    for start in range(0, n, PANEL):
        stop = min(start + PANEL, n)
        moves = torch.empty_like(rounded[:, start:stop])
        for k in range(start, stop, dim):
            block, inside = slice(k, k + dim), slice(k - start, k - start + dim)
            here, g = rounded[:, block], slope[:, block]
            new_codes, values = grid.round(here + g @ inverse[k // dim], block)
            move = values - here
            change = (move * (move @ H[block, block] - 2 * g)).sum(1, keepdim=True)
            change = grid.book.pool_rows(change)
            better = change < 0
            moves[:, inside] = move = torch.where(better, move, 0.0)
            codes[:, k // dim : k // dim + 1] = torch.where(better, new_codes, codes[:, k // dim : k // dim + 1])
            rounded[:, block] = torch.where(better, values, here)
            slope[:, k + dim : stop].addmm_(move, H[block, k + dim : stop], alpha=-1)
        slope[:, stop:].addmm_(moves, H[start:stop, stop:], alpha=-1)
    return codes, rounded


def refit_scales(W: Tensor, rounded: Tensor, weighted: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The scales that minimise each row's loss for fixed codes.

    Args:
        W, rounded: [out, in].
        weighted: rounded H, [out, in].
        scales: [out] that `rounded` was made with.

    Returns:
        New scales [out], and the factor [out, 1] by which they multiply `rounded`.
    """
    numerator, denominator = (W * weighted).sum(1), (rounded * weighted).sum(1)
    # A row whose codes all point the wrong way would want a negative scale; it keeps the old one.
    usable = (numerator > 0) & (denominator > 0)
    factor = torch.where(usable, numerator / denominator.clamp(min=1e-30), torch.ones_like(numerator))
    refitted = representable(scales * factor)
    return refitted, _divide(refitted, scales).unsqueeze(1)
