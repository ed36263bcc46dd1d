"""W ~ Q + L R for one matrix, by alternating minimisation (Saha et al., CALDERA, 2024, algorithm 1), with changes.

Three things differ from the published loop. The rounding step sees the marginalised Gram: for a fixed row space of R,
and L to be refitted, the exact loss of Q is tr(E M (I - V V^T) M^T E^T), V an orthonormal basis of the rows of R M.
The loop always ends on a refit of L R. And the loss of every iterate is that of the stored, rounded factors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import DampedGram, proxy_loss
from hf_lrq.decomposition.lowrank import LowRankSolver, whitened_factors
from hf_lrq.decomposition.quantizers import Quantizer
from hf_lrq.errors import SpecError
from hf_lrq.matrices import LowRank, QuantizedMatrix

LEAST_GAIN = 0.005  # Relative; below it another iteration is not worth its time.
PATIENCE = 1  # The loop is not monotone: one iteration without gain is no sign that it is over.
# Guarded sweeps cannot overfit the marginalised Gram as LDLQ does, so they get nearly the exact one.
REFINEMENT_DAMPING = 0.03

Factors = tuple[Tensor, Tensor]  # float L [out, r] and R [r, in]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """W ~ Q + L R.

    Attributes:
        quantized: Q.
        low_rank: L R.
        trace: relative proxy loss after each iteration; the result is the iterate of the least one.
    """

    quantized: QuantizedMatrix
    low_rank: LowRank
    trace: tuple[float, ...]

    @property
    def proxy_loss(self) -> float:
        """Relative proxy loss of the result."""
        return min(self.trace)

    def dense(self) -> Tensor:
        """Q + L R, [out, in] float32."""
        return self.quantized.dequantize() + self.low_rank.dense()


def decompose(
    W: Tensor,
    gram: DampedGram,
    quantizer: Quantizer,
    solver: LowRankSolver,
    generator: torch.Generator,
    *,
    start: Factors,
    iters: int = 8,
    refinements: int = 4,
    marginal_damping: float = 0.2,
) -> Decomposition:
    """Decompose one weight matrix.

    First `iters` iterations round W - L R from scratch and refit L R; they can raise the loss, so the best one is
    kept. Then `refinements` iterations improve that one: guarded sweeps from the codes at hand, then a refit. The
    last step is a guarded sweep under the full Gram with L R fixed, which also absorbs the rounding of the factors.

    Args:
        W: [out, in] float32.
        gram: of the layer's inputs.
        quantizer, solver: the two steps.
        generator: of the random starts of large SVDs.
        start: float L [out, s] and R [s, in] before the first rounding.
        iters: roundings from scratch, at least 1.
        refinements: at least 0.
        marginal_damping: ridge on the marginalised Gram while rounding from scratch, as a fraction of its mean
            diagonal.
    """
    if iters < 1:
        raise SpecError(f"iters must be at least 1, got {iters}.")
    rank = min(solver.rank, *W.shape)
    search = _Search(W, gram)
    L, R = start
    for _ in range(iters if rank else 1):
        quantized = quantizer.quantize(W - L @ R, marginalise(gram, R, marginal_damping))
        low_rank = solver.solve(W - quantized.dequantize(), gram, generator)
        search.add(quantized, low_rank)
        if search.idle > PATIENCE:
            break
        L, R = low_rank.L.dense(), low_rank.R.dense()
    for _ in range(refinements if rank else 0):
        L, R = search.low_rank.L.dense(), search.low_rank.R.dense()
        quantized = quantizer.refine(W - L @ R, marginalise(gram, R, REFINEMENT_DAMPING), search.quantized)
        search.add(quantized, solver.solve(W - quantized.dequantize(), gram, generator))
        if search.idle:
            break
    closed = quantizer.refine(W - search.low_rank.dense(), gram.H, search.quantized)
    search.add(closed, search.low_rank)
    return search.result()


class _Search:
    """The best iterate so far, and the losses of all."""

    quantized: QuantizedMatrix
    low_rank: LowRank

    def __init__(self, W: Tensor, gram: DampedGram):
        self._W, self._H = W, gram.H
        self._trace: list[float] = []
        self.idle = 0  # iterations in a row without a gain worth having

    def add(self, quantized: QuantizedMatrix, low_rank: LowRank) -> None:
        """Rate an iterate."""
        loss = proxy_loss(self._W, quantized.dequantize() + low_rank.dense(), self._H)
        least = min(self._trace, default=float("inf"))
        self.idle = self.idle + 1 if loss > least * (1 - LEAST_GAIN) else 0
        # Not <, or a weight that is all zero, or a loss that is infinite, would leave nothing to return.
        if not self._trace or loss < least:
            self.quantized, self.low_rank = quantized, low_rank
        self._trace.append(loss)

    def result(self) -> Decomposition:
        """The best iterate."""
        return Decomposition(self.quantized, self.low_rank, tuple(self._trace))


def marginalise(gram: DampedGram, R: Tensor, damping: float) -> Tensor:
    """M (I - V V^T) M^T + damping * mean diagonal, V an orthonormal basis of the rows of R M.

    Without rows it is the Gram itself.

    Args:
        gram: H = M M^T.
        R: [r, in] the right factor that is kept.
        damping: fraction of the mean diagonal of the result before damping.
    """
    if len(R) == 0:
        return gram.H
    V = torch.linalg.qr((R @ gram.M).T).Q
    projected = gram.M @ V  # [in, r]
    H = gram.H - projected @ projected.T
    # With as many ranks as inputs nothing is left of H but rounding errors; the floor keeps it positive definite.
    H.diagonal().add_(damping * H.diagonal().mean().clamp(min=0) + 1e-5 * gram.H.diagonal().mean())
    return (H + H.T) / 2


def zero_start(W: Tensor) -> Factors:
    """Factors of rank 0."""
    return W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1])


def svd_start(W: Tensor, gram: DampedGram, rank: int, generator: torch.Generator) -> Factors:
    """The best rank-r approximation of W itself in the metric of the Gram."""
    return whitened_factors(W, gram, rank, generator)


def outlier_start(W: Tensor, H: Tensor, rank: int) -> Factors:
    """The input channels of largest energy, a quarter as many as there are ranks: L = W[:, kept], R selects them.

    So few columns are exactly of low rank, and they are the ones that rounding hurts most (ODLRI, 2025). To be called
    before the rotation, which mixes the channels.
    """
    kept = H.diagonal().topk(max(rank // 4, min(rank, 1))).indices
    R = torch.zeros(len(kept), W.shape[1], device=W.device)
    R[torch.arange(len(kept), device=W.device), kept] = 1
    return W[:, kept], R
