"""Under what L R are fitted: the Grams of the inputs and outputs, or what a method takes in their place.

A metric is a positive semi-definite [in, in] matrix S S^T; L R minimise |(A - L R) S|_F, and where outputs are weighed
as well, by T T^T, |T^T (A - L R) S|_F. It is made in the basis of the weight as it came, before any rotation, which
mixes the inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import InputGram
from hf_lrq.errors import CompressionError


def full(gram: InputGram) -> Tensor:
    """E[x x^T]: the exact loss of the layer's outputs (QERA, 2024; EoRA, 2024; CALDERA, 2024)."""
    return gram.H


def diagonal(gram: InputGram) -> Tensor:
    """diag(E[x_i^2]): the same if the inputs were uncorrelated (QERA-approx, 2024).

    Of a Gram whose tokens are weighed by their squared gradients it is, up to a factor, the mean over rows of the
    diagonal Fisher information E[(g_i x_j)^2] (LQ-LoRA, 2023, section 3.3).
    """
    return gram.H.diagonal().diag()


def magnitudes(gram: InputGram) -> Tensor:
    """diag(E|x_i|)^2 (LQER, 2024; a common factor makes no difference).

    Raises:
        CompressionError: if the Gram came as a matrix, which does not hold them.
    """
    if gram.magnitudes is None:
        raise CompressionError(
            'metric="magnitudes" takes the mean absolute value of each input, and this Gram was made of a matrix. Make '
            'it of the inputs, or take metric="diagonal".'
        )
    return gram.magnitudes.square().diag()


def identity(gram: InputGram) -> Tensor:
    """I: the error of the weight itself."""
    return torch.eye(len(gram.H), dtype=gram.H.dtype, device=gram.H.device)


def squared(gram: InputGram) -> Tensor:
    """E[x x^T]^2: the Gram itself in the place of its root (CorDA, 2024)."""
    H = gram.H / gram.H.diagonal().mean()  # Or large inputs would overflow float32.
    return H @ H


METRICS: dict[str, Callable[[InputGram], Tensor]] = {
    "gram": full,
    "diagonal": diagonal,
    "magnitudes": magnitudes,
    "identity": identity,
    "squared": squared,
}


def output_diagonal(H: Tensor) -> Tensor:
    """diag(H_O): up to a factor the mean over columns of the diagonal Fisher information (LQ-LoRA, 2023)."""
    return H.diagonal().diag()


def output_identity(H: Tensor) -> Tensor:
    """I: all outputs count alike."""
    return torch.eye(len(H), dtype=H.dtype, device=H.device)


# What takes the place of the Gram of the outputs; where nothing does, it is that Gram itself.
OUTPUT_METRICS: dict[str, Callable[[Tensor], Tensor]] = {"diagonal": output_diagonal, "identity": output_identity}
