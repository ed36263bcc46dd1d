"""What L R is before the first step: a table of starts, by name."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import DampedGram
from hf_lrq.decomposition.lowrank import truncated_svd, whitened_factors
from hf_lrq.decomposition.rotated import Rotated
from hf_lrq.matrices import Pair


@dataclass(frozen=True, eq=False)
class Setting:
    """What a start can look at.

    Attributes:
        W: [out, in] float32, as it came.
        H: [in, in] Gram of the inputs, as it came.
        rotated: the same, as they are rounded.
        rank: r, at most min(out, in).
        generator: draws what is random.
    """

    W: Tensor
    H: Tensor
    rotated: Rotated
    rank: int
    generator: torch.Generator


def zero_start(W: Tensor) -> Pair:
    """Factors of rank 0."""
    return W.new_zeros(W.shape[0], 0), W.new_zeros(0, W.shape[1])


def svd_start(
    W: Tensor, gram: DampedGram, rank: int, generator: torch.Generator, output: DampedGram | None = None
) -> Pair:
    """The best rank-r approximation of W itself in the metric of the Gram, or Grams."""
    return whitened_factors(W, gram, rank, generator, output)


def outlier_start(W: Tensor, H: Tensor, rank: int) -> Pair:
    """The input channels of largest energy, a quarter as many as there are ranks: L = W[:, kept], R selects them.

    So few columns are exactly of low rank, and they are the ones that rounding hurts most (ODLRI, 2025). To be called
    before the rotation, which mixes the channels.
    """
    kept = H.diagonal().topk(max(rank // 4, min(rank, 1))).indices
    R = W.new_zeros(len(kept), W.shape[1])
    R[torch.arange(len(kept), device=W.device), kept] = 1
    return W[:, kept], R


def inputs_start(W: Tensor, gram: DampedGram, rank: int) -> Pair:
    """L = 0, and R the r leading eigenvectors of the Gram, which hold most of the inputs' energy (EVA, 2024)."""
    _, vectors = torch.linalg.eigh(gram.H)
    return W.new_zeros(W.shape[0], rank), vectors[:, len(vectors) - rank :].T.flip(0).contiguous()


def split_start(W: Tensor, gram: DampedGram, rank: int, generator: torch.Generator) -> Pair:
    """The k leading singular directions of the scaled weight, to be kept from rounding (SRR, 2026).

    rho_k(A) is the share of |A|_F that a rank-k approximation leaves. What rounding sees of the weight is rho_k(W S),
    and what the other r - k ranks leave of its error is rho_(r-k)(E S); an error E of rounding being much like noise,
    uniform noise stands for it. k is where the product is least.
    """
    noise = torch.rand(W.shape, generator=generator, device=generator.device).to(W) - 0.5
    kept, left = (_left_over(A @ gram.M, rank, generator) for A in (W, noise))
    return whitened_factors(W, gram, int((kept * left.flip(0)).argmin()), generator)


def _left_over(A: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """rho_k(A) for k = 0 to rank."""
    sigma = truncated_svd(A, rank, generator)[1]
    energy = A.square().sum()
    left = energy - torch.nn.functional.pad(sigma.square(), (1, 0)).cumsum(0)
    return (left.clamp(min=0) / energy.clamp(min=1e-30)).sqrt()


STARTS: dict[str, Callable[[Setting], Pair]] = {
    "zero": lambda at: zero_start(at.W),
    "svd": lambda at: svd_start(at.rotated.W, at.rotated.fit, at.rank, at.generator, at.rotated.fit_output),
    "outlier": lambda at: at.rotated.pair(*outlier_start(at.W, at.H, at.rank)),
    "inputs": lambda at: inputs_start(at.rotated.W, at.rotated.gram, at.rank),
    "split": lambda at: split_start(at.rotated.W, at.rotated.fit, at.rank, at.generator),
}
TRIED = ("zero", "svd", "outlier")  # By init="auto".
