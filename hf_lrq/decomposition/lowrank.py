"""Rank-constrained regression: the L R that best explains a residual under the proxy loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import DampedGram
from hf_lrq.matrices import LowRank, Pair, quantize_factor

EXACT_SIZE = 512  # Up to this many rows or columns a full SVD is as fast as iterating.
OVERSAMPLING = 16
POWER_ITERATIONS = 4
LPLR_ITERATIONS = 8


def truncated_svd(A: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The leading singular triplets of A.

    Small matrices get an exact SVD. Large ones get a randomised range finder with power iterations (Halko et al.,
    2011, algorithm 4.4).

    Args:
        A: [m, n].
        rank: k, at most min(m, n).
        generator: draws the random start.

    Returns:
        U [m, k], sigma [k], Vt [k, n].
    """
    if min(A.shape) <= max(EXACT_SIZE, 2 * rank):
        U, sigma, Vt = torch.linalg.svd(A, full_matrices=False)
        return U[:, :rank], sigma[:rank], Vt[:rank]
    width = min(rank + OVERSAMPLING, *A.shape)
    basis = torch.randn(A.shape[1], width, generator=generator, device=generator.device).to(A)
    Q = torch.linalg.qr(A @ basis).Q
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.T @ Q).Q).Q
    U, sigma, Vt = torch.linalg.svd(Q.T @ A, full_matrices=False)
    return (Q @ U)[:, :rank], sigma[:rank], Vt[:rank]


def rank_above(W: Tensor, share: float) -> int:
    """How many singular values of W [m, n] are at least this share of the largest (WeLore, 2024); 0 for W = 0.

    >>> rank_above(torch.tensor([4.0, 2.0, 1.0]).diag(), 0.5)
    2
    """
    sigma = torch.linalg.svdvals(W)
    return int(((sigma >= share * sigma[0]) & (sigma > 0)).sum())


@dataclass(frozen=True)
class LowRankSolver(ABC):
    """Maps a residual and its input Gram to stored factors.

    Attributes:
        rank: r; clamped to the matrix.
    """

    rank: int

    @abstractmethod
    def solve(
        self, residual: Tensor, gram: DampedGram, generator: torch.Generator, output: DampedGram | None = None
    ) -> LowRank:
        """Factors of rank r for residual [out, in]; `output` is the Gram H_O of the loss tr(H_O E H E^T)."""

    def store(self, L: Tensor, R: Tensor) -> LowRank:
        """What is stored of float factors L [out, r] and R [r, in]: float16 values."""
        return LowRank(quantize_factor(L, 16, rank_dim=1), quantize_factor(R, 16, rank_dim=0))


@dataclass(frozen=True)
class WhitenedSVD(LowRankSolver):
    """The exact minimiser of tr((A - L R) H (A - L R)^T), stored in float16.

    With H = M M^T the loss is |A M - L R M|_F^2, so L R M is the truncated SVD of A M (Eckart-Young), and R takes one
    triangular solve; with an output Gram, the same from both sides. The singular values are shared equally, so both
    factors have the same scale.
    """

    def solve(
        self, residual: Tensor, gram: DampedGram, generator: torch.Generator, output: DampedGram | None = None
    ) -> LowRank:
        """See the class."""
        return self.store(*whitened_factors(residual, gram, self.rank, generator, output))


def whitened_factors(
    A: Tensor, gram: DampedGram, rank: int, generator: torch.Generator, output: DampedGram | None = None
) -> Pair:
    """Balanced float32 L [out, r], R [r, in]: the best rank-r approximation of A in the metric of the Gram, or Grams.

    tr(H_O E H E^T) = |M_O^T E M|_F^2 with H_O = M_O M_O^T, so M_O^T L R M is the truncated SVD of M_O^T A M.
    """
    rank = min(rank, *A.shape)
    if rank == 0:
        return A.new_zeros(A.shape[0], 0), A.new_zeros(0, A.shape[1])
    whitened = A @ gram.M if output is None else output.M.T @ (A @ gram.M)
    U, sigma, Vt = truncated_svd(whitened, rank, generator)
    L = U if output is None else torch.linalg.solve_triangular(output.M.T, U, upper=True)
    R = torch.linalg.solve_triangular(gram.M, sigma[:, None] * Vt, upper=False, left=False)
    return balance(L, R)


def balance(L: Tensor, R: Tensor) -> Pair:
    """Rescale each rank so that its column of L and its row of R have the same root mean square; L R is unchanged."""
    left, right = L.square().mean(0).sqrt(), R.square().mean(1).sqrt()
    usable = (left > 0) & (right > 0)
    ratio = torch.where(usable, (right / left.clamp(min=1e-30)).sqrt(), torch.ones_like(left)).clamp(min=1e-30)
    return L * ratio, R / ratio[:, None]


@dataclass(frozen=True)
class LPLR(LowRankSolver):
    """Low-precision factors: closed-form L and R updates alternate with rounding (CALDERA, 2024, algorithm 2).

    Attributes:
        bits: 8 or 4, with one scale per rank.
        iters: alternations; the best pair is kept.
    """

    bits: int = 8
    iters: int = LPLR_ITERATIONS

    def solve(
        self, residual: Tensor, gram: DampedGram, generator: torch.Generator, output: DampedGram | None = None
    ) -> LowRank:
        """See the class."""
        L, R = whitened_factors(residual, gram, self.rank, generator, output)
        if L.shape[1] == 0:
            return LowRank.zero(residual.shape[0], residual.shape[1], residual.device)
        best: LowRank | None = None
        best_loss = float("inf")
        AH = residual @ gram.H
        energy = (_weighted(AH, output) * residual).sum(dtype=torch.float64).item()
        for _ in range(self.iters):
            stored_R = quantize_factor(R, self.bits, rank_dim=0)
            R_hat = stored_R.dense()
            whitened = (R_hat @ gram.M).double()
            inner, cross = whitened @ whitened.T, AH @ R_hat.T  # R H R^T [r, r], A H R^T [out, r]
            L = _solve_symmetric(inner, cross.T).T  # argmin over L for this R, whatever the output Gram
            stored_L = quantize_factor(L, self.bits, rank_dim=1)
            L_hat = stored_L.dense()
            # tr(H_O (A - L R) H (A - L R)^T) without another product of the size of A.
            L64 = L_hat.double()
            outer = L64.T @ _weighted(L64, output)  # L^T H_O L [r, r]
            loss = energy - 2 * (L64 * _weighted(cross, output)).sum().item() + (outer * inner).sum().item()
            if best is None or loss < best_loss * (1 - 1e-4):
                best, best_loss = LowRank(stored_L, stored_R), loss
            else:
                break
            R = _solve_symmetric(outer, _weighted(L_hat, output).T @ residual)  # argmin over R; H cancels
            L, R = balance(L_hat, R)
        assert best is not None, "iters is at least 1"
        return best

    def store(self, L: Tensor, R: Tensor) -> LowRank:
        """Codes of float factors L [out, r] and R [r, in], each rounded by itself."""
        return LowRank(quantize_factor(L, self.bits, rank_dim=1), quantize_factor(R, self.bits, rank_dim=0))


def _weighted(values: Tensor, output: DampedGram | None) -> Tensor:
    """H_O times [out, ...] values."""
    return values if output is None else output.H.to(values.dtype) @ values


def _solve_symmetric(G: Tensor, B: Tensor) -> Tensor:
    """G^-1 B in the dtype of B; G [r, r] float64, X X^T for some X.

    G has to be summed in float64: where the ranks outnumber those of the residual, it is singular, and the roundings of
    float32 would make it indefinite by more than the ridge.
    """
    ridge = 1e-9 * G.diagonal().mean().clamp(min=1e-300)
    eye = torch.eye(len(G), dtype=G.dtype, device=G.device)
    return torch.cholesky_solve(B.double(), torch.linalg.cholesky(G + ridge * eye)).to(B.dtype)
