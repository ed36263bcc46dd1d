"""What a matrix will lose to bits and a rank, without rounding it: rounding as noise.

In incoherent coordinates the error that a codebook leaves on its input is close to noise of known variance, whatever
the input (QuIP, 2023, section 3). With H_I = U D U^T in blocks of the codebook's vectors, LDLQ's loss is then the
variance times the trace of D; so is it over blocks of rows with H_O (`row_feedback`). Without feedback the traces are
those of the Grams. Factors that are refitted to the
error take r directions of H_I away, the largest ones: the loss of the rest is that of the marginalised Gram. Within
what is left they follow the largest singular values of the error itself, a matrix of noise, whose share Marchenko and
Pastur's law gives (1967).
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.decomposition.gram import marginalise, weighted_square
from hf_lrq.decomposition.lowrank import truncated_svd
from hf_lrq.decomposition.quantizers import LDLQ, upper_cholesky
from hf_lrq.decomposition.rotated import Rotated
from hf_lrq.decomposition.row_feedback import row_blocks
from hf_lrq.layout import LayerLayout

SAMPLES = 128  # Rows and columns of the noise that a codebook is tried on: its variance to about 1 %.
STEPS = 4096  # Of the integral over the spectrum.


@dataclass(frozen=True)
class Feedback:
    """Where errors of roundings go.

    Attributes:
        columns: into other columns, as LDLQ does.
        rows: into other rows as well, where there is a Gram of the outputs.
    """

    columns: bool = True
    rows: bool = True


class NoiseModel:
    """Predicts the proxy loss of one matrix for many codebooks and ranks.

    Args:
        rotated: the matrix and its Grams in the coordinates in which it is rounded.
        feedback: where errors of roundings go.
        most: largest rank that will be asked for.

    Attributes:
        energy: tr(H_O W H_I W^T), the loss of nothing at all, with Grams of mean diagonal 1.
    """

    def __init__(self, rotated: Rotated, feedback: Feedback, most: int):
        self._rotated, self._feedback = rotated, feedback
        W, gram, output = rotated.W, rotated.gram, rotated.output
        self.energy = weighted_square(W, gram.H, None if output is None else output.H)
        # Of a symmetric matrix the singular vectors are the eigenvectors, and a few of them are found much faster.
        self._directions = truncated_svd(gram.H, min(most, *W.shape), torch.Generator().manual_seed(0))[2]
        self._spread: dict[tuple[int, int], float] = {}

    def loss(self, layout: LayerLayout) -> float:
        """Predicted tr(H_O E H_I E^T) of a layout, in the units of `energy`."""
        W = self._rotated.W
        rank = layout.clamped_rank(*W.shape)
        if rank == min(W.shape):
            return 0.0
        R = self._directions[:rank]
        residual = W - (W @ R.T) @ R
        variance = residual.square().mean(1) * distortion(layout.codebook)
        columns = self._columns(R, get_codebook(layout.codebook).dim)
        return (variance * self._rows(layout)).sum().item() * columns * _noise_left(*W.shape, rank)

    def _columns(self, R: Tensor, block: int) -> float:
        """Trace of D of the marginalised Gram, or of that itself."""
        key = len(R), block
        if key not in self._spread:
            H = marginalise(self._rotated.gram, R, 0.0)
            self._spread[key] = _block_trace(H, block) if self._feedback.columns else H.diagonal().sum().item()
        return self._spread[key]

    def _rows(self, layout: LayerLayout) -> Tensor:
        """What an error of each row costs, [out]."""
        output = self._rotated.output
        if output is None:
            return torch.ones(len(self._rotated.W), device=self._rotated.W.device)
        if not self._feedback.rows:
            return output.H.diagonal()
        C = upper_cholesky(output.H)
        blocks = row_blocks(LDLQ(layout.codebook), len(C))
        return torch.cat([C[rows, rows].square().sum(1) for rows in blocks])


def _block_trace(H: Tensor, block: int) -> float:
    """Trace of D in H = U D U^T, U unit upper triangular in blocks."""
    C = upper_cholesky(H)
    return sum(C[k : k + block, k : k + block].square().sum().item() for k in range(0, len(C), block))


@functools.cache
def distortion(codebook: str) -> float:
    """Mean squared error of a codebook on numbers of N(0, 1), by a fixed sample of them."""
    book = get_codebook(codebook)
    columns = -(-SAMPLES // book.dim)
    rows = -(-SAMPLES // book.row_block) * book.row_block
    x = book.deviation * torch.randn(rows, columns, book.dim, generator=torch.Generator().manual_seed(0))
    return (x - book.decode(book.encode(x), torch.float32)).square().mean().item() / book.deviation**2


@functools.cache
def _noise_left(out_features: int, in_features: int, rank: int) -> float:
    """What the largest `rank` singular values leave of noise, over what as many fixed directions would leave."""
    small, large = sorted((out_features, in_features))
    kept = rank / small
    if kept == 0:
        return 1.0
    ratio = small / large
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    x = torch.linspace(low, high, STEPS + 1, dtype=torch.float64)
    x = (x[1:] + x[:-1]) / 2
    density = ((high - x) * (x - low)).clamp(min=0).sqrt() / x
    density /= density.sum()
    inside = density.cumsum(0) <= 1 - kept
    return ((density * x)[inside].sum() / (density * x).sum()).item() / (1 - kept)
