"""Rounding under a loss that couples the rows: tr(H_O E H_I E^T), H_O the Gram of the gradients at the outputs.

The rows are taken in a few blocks. With H_O = U D U^T, U unit upper triangular in these blocks, the loss is the sum
over blocks of the loss of (U^T E)_i under D_ii and H_I; so block i is rounded by the ordinary method from its weights
plus the errors of the blocks before, U^T (W - Q), as LDLQ does over columns (YAQA, 2025, in both directions). The
coupling inside of a block is left out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import DampedGram, weighted_square
from hf_lrq.decomposition.quantizers import Quantizer, upper_cholesky
from hf_lrq.matrices import QuantizedMatrix

# Of b blocks, 1 - 1 / b of the pairs of rows are coupled. Each is a pass over the columns, which is slow for few rows.
MOST_BLOCKS, FEWEST_ROWS = 8, 128


def quantize_rows(quantizer: Quantizer, W: Tensor, H: Tensor, output: DampedGram | None) -> QuantizedMatrix:
    """Round W [out, in] so that tr(H_O (W - Q) H (W - Q)^T) is small; without `output`, H_O = I.

    A quantizer that feeds no errors back ignores both Grams.
    """
    if output is None or not quantizer.feeds_back:
        return quantizer.quantize(W, H)
    C = upper_cholesky(output.H)
    error = torch.zeros_like(W)
    parts = []
    for rows in row_blocks(quantizer, len(W)):
        before = slice(0, rows.start)
        U = torch.linalg.solve_triangular(C[rows, rows], C[before, rows], upper=True, left=False)
        parts.append(quantizer.quantize(W[rows] + U.T @ error[before], H))
        error[rows] = W[rows] - parts[-1].dequantize()
    return QuantizedMatrix.stacked(parts)


def refine_rows(
    quantizer: Quantizer, W: Tensor, H: Tensor, output: DampedGram | None, previous: QuantizedMatrix
) -> QuantizedMatrix:
    """Improve codes block after block, with the errors of all others fixed, as `Quantizer.refine` does; the loss does
    not rise. Without `output`, H_O = I.

    The best values of block i are its weights plus H_ii^-1 of what the errors of the others leave there. Towards these
    the rows of a block are refined as if they were independent; the block moves only if its loss falls all the same.
    """
    if output is None or not quantizer.feeds_back:
        return quantizer.refine(W, H, previous)
    error = W - previous.dequantize()
    parts = []
    for rows in row_blocks(quantizer, len(W)):
        inner = output.H[rows, rows]
        shift = torch.cholesky_solve(output.H[rows] @ error, torch.linalg.cholesky(inner)) - error[rows]
        target, part = W[rows] + shift, previous.part(rows.start, rows.stop)
        refined = quantizer.refine(target, H, part)
        if weighted_square(target - refined.dequantize(), H, inner) < weighted_square(error[rows] + shift, H, inner):
            part = refined
            error[rows] = W[rows] - refined.dequantize()
        parts.append(part)
    return QuantizedMatrix.stacked(parts)


def row_blocks(quantizer: Quantizer, out_features: int) -> Iterator[slice]:
    """The blocks of rows that are rounded one after another."""
    unit = quantizer.book.row_block
    size = max(-(-out_features // (MOST_BLOCKS * unit)), -(-FEWEST_ROWS // unit)) * unit
    for start in range(0, out_features, size):
        yield slice(start, min(start + size, out_features))
