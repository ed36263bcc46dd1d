"""The preconditioner of a low-rank product: a factor's gradient is divided by the Gram of the other factor.

For W = s L R and G = dLoss/dW, the gradients of the factors are s G Rᵀ and s Lᵀ G: their size and condition follow the
*other* factor. Scaled gradient descent (Tong, Ma & Chi, 2021; for adapters Zhang & Pilanci, 2024) undoes that with

    grad_L (s² (R Rᵀ + d_R I))⁻¹   and   (s² (Lᵀ L + d_L I))⁻¹ grad_R,   d = damping · tr(Gram) / r.

As the damping goes to zero, the step on W no longer depends on how the product is split: (L A, A⁻¹ R) takes the same
step as (L, R), and s drops out. Damping is relative so that this also holds for rescaled factors when it is not zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.optim.sharding import placed_like, replicate_beside, replicated

DAMPING = 1e-6  # About ten float32 roundings of the mean eigenvalue. Much more undoes the preconditioning.
MAX_ATTEMPTS = 16


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def check_damping(damping: float) -> None:
    """Complain about a damping that could leave a Gram singular.

    Raises:
        ValueError: saying what it may be.
    """
    if not 0 < damping < math.inf:
        raise ValueError(f"damping is {damping}; it must be positive, {DAMPING} for example.")


def left_gram(L: Tensor, out: Tensor | None = None) -> Tensor:
    """Lᵀ L of L [..., out, r], whole on every rank; written to `out` if that is given."""
    return replicated(torch.matmul(L.mT, L, out=out))


def right_gram(R: Tensor, out: Tensor | None = None) -> Tensor:
    """R Rᵀ of R [..., r, in], whole on every rank; written to `out` if that is given."""
    return replicated(torch.matmul(R, R.mT, out=out))


def inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Lower-triangular K with Kᵀ K = (gram + d I)⁻¹, where d = damping · tr(gram) / r.

    An all-zero Gram gets K = I: it belongs to a factor that is zero (LoRA's L at the start), so that the gradient K is
    meant for is zero too. Where rounding leaves a damped Gram indefinite, d grows tenfold until it is not.

    Args:
        gram: [..., r, r], positive semi-definite up to rounding; float32 or float64.
        damping: positive, a fraction of the mean eigenvalue.

    Returns:
        [..., r, r]

    Raises:
        FloatingPointError: if a Gram is not finite.

    >>> inverse_root(4 * torch.eye(2), 1e-9)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    alive = mean > 0
    unit = torch.where(alive, mean, torch.ones_like(mean))
    shift = torch.where(alive, torch.full_like(mean, damping), torch.ones_like(mean))
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(MAX_ATTEMPTS):
        damped = gram / unit
        damped.diagonal(dim1=-2, dim2=-1).add_(shift.squeeze(-1))
        C, info = torch.linalg.cholesky_ex(damped)
        failed = (info != 0)[..., None, None]
        if not failed.any():
            return torch.linalg.solve_triangular(C, eye * unit.rsqrt(), upper=False)
        if not gram.isfinite().all():
            break
        shift = torch.where(failed, 10 * shift, shift)
    raise FloatingPointError("The Gram of a factor is not finite. Lower the learning rate or look at the data.")


@dataclass(frozen=True)
class Whitening:
    """Coordinates of one factor's gradient in which every split of the product looks alike.

    With (R Rᵀ + d I)⁻¹ = Kᵀ K, the whitened gradient of L is grad_L Kᵀ; its norm is the norm of dLoss/dW restricted to
    the row space of R. A step taken in these coordinates returns to L as step K. For R the same, from the other side.
    Rescaling each rank by a factor of its own changes neither.

    Attributes:
        K: [..., r, r], inverse root of the Gram of the *other* factor.
        left: whether the gradient is that of L.
    """

    K: Tensor
    left: bool

    def unbind(self) -> list["Whitening"]:
        """A whitening for each entry of the first axis."""
        return [Whitening(K, self.left) for K in self.K.unbind(0)]

    def whiten(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """X whitened, in the shape of the factor and sharded as X is. Written to `out` if that is given."""
        return self._times(X, self.K.mT if self.left else self.K, out)

    def unwhiten(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """X brought back from whitened coordinates to those of the factor."""
        return self._times(X, self.K if self.left else self.K.mT, out)

    def precondition(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """X whitened and then unwhitened, which multiplies it by the damped inverse Gram."""
        return self._times(X, self.K.mT @ self.K, out)

    def _times(self, X: Tensor, matrix: Tensor, out: Tensor | None) -> Tensor:
        matrix = replicate_beside(matrix, X)
        operands = (X, matrix) if self.left else (matrix, X)
        return placed_like(torch.matmul(*operands, out=out), X)


def whitening_for_L(R: Tensor, damping: float, scaling: float = 1.0) -> Whitening:
    """The whitening of L's gradient, from R [..., r, in]."""
    return Whitening(inverse_root(right_gram(R.to(compute_dtype(R))), damping) / abs(scaling), left=True)


def whitening_for_R(L: Tensor, damping: float, scaling: float = 1.0) -> Whitening:
    """The whitening of R's gradient, from L [..., out, r]."""
    return Whitening(inverse_root(left_gram(L.to(compute_dtype(L))), damping) / abs(scaling), left=False)


def precondition(
    grad_L: Tensor, grad_R: Tensor, L: Tensor, R: Tensor, damping: float = DAMPING, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """grad_L (s² (R Rᵀ + d_R I))⁻¹ and (s² (Lᵀ L + d_L I))⁻¹ grad_R, with d = damping · tr(Gram) / r.

    Grams and their factorization are float32 (float64 for float64 factors).

    Args:
        grad_L, L: [..., out, r]; leading dimensions are independent products.
        grad_R, R: [..., r, in].
        damping: positive; a fraction of the mean eigenvalue of each Gram.
        scaling: s, where the product is s L R.

    Returns:
        Tensors with the shapes and dtypes of the gradients.

    Raises:
        ValueError: if the damping is not positive.
        FloatingPointError: if a factor is not finite.

    Source: Zhang & Pilanci, Riemannian Preconditioned LoRA, 2024, eq. (4); there the damping is absolute.

    >>> precondition(torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), 2.0), torch.full((1, 1), 0.5))
    (tensor([[4.0000]]), tensor([[0.2500]]))
    """
    check_damping(damping)
    left, right = whitening_for_L(R, damping, scaling), whitening_for_R(L, damping, scaling)
    return (
        left.precondition(grad_L.to(left.K.dtype)).to(grad_L.dtype),
        right.precondition(grad_R.to(right.K.dtype)).to(grad_R.dtype),
    )
