"""The H-aware preconditioner (experimental): the metric of a weight in which a layer's inputs are white.

Where the loss is quadratic in the outputs, a change of W counts as tr(dW H dWᵀ), with the Gram H = E[x xᵀ] of the
inputs. Along dL R and L dR this is tr(dL (R H Rᵀ) dLᵀ) and tr((Lᵀ L) dR H dRᵀ); so, for W = s L R, the gradients become

    grad_L (s² R H Rᵀ)⁻¹   and   (s² Lᵀ L)⁻¹ grad_R H⁻¹.

The last factor belongs to it: grad_R = s Lᵀ (W - W*) H carries the condition of H, which nothing else would take out.
On ||(L R - M) H^½||² / 2 a step then shrinks the error by the same fraction for every H; without H the number of steps
grows with its condition. H is shrunk towards its mean eigenvalue h first, (1 - d) H + d h I, or rare directions of the
inputs would get steps without bound.

    grams = input_grams(model, batches)  # of hf_lrq.calibration
    optimizer = RiemannianAdamW(riemannian_param_groups(model, grams=grams), precond="h_aware")

Source: a metric from the Hessian of a quadratic, Mishra & Sepulchre, Riemannian Preconditioning, 2016; H on the input
side is also the one factor of K-FAC (Martens & Grosse, 2015).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.optim.sharding import placed_like, replicate_beside

GRAM_DAMPING = 1e-2  # As in calibration, where directions below it are noise.
ROUNDING = 1e-6  # How far below zero rounding may put an eigenvalue of a float32 Gram, as a fraction of the largest.


@dataclass(frozen=True, eq=False, repr=False)
class InputMetric:
    """H and its inverse, damped.

    Attributes:
        H, inverse: H and H⁻¹, [in, in]; or their diagonals, [in].
    """

    H: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, gram: Tensor, width: int, damping: float = GRAM_DAMPING, name: str = "a pair") -> "InputMetric":
        """The metric from the Gram of what R is multiplied with.

        Args:
            gram: [in, in], or the diagonal [in] for inputs that are taken to be uncorrelated; any float dtype, computed
                with in float64.
            width: number of inputs of R.
            damping: in (0, 1]; with 1, nothing of H is left but its mean eigenvalue.
            name: what messages call the pair.

        Raises:
            ValueError: if the Gram has another shape, is not finite, symmetric or positive semi-definite, is zero, or
                the damping is too small for it.
        """
        if not 0 < damping <= 1:
            raise ValueError(
                f"gram_damping is {damping}; it must be above 0 and at most 1, {GRAM_DAMPING} for example."
            )
        check_shape(gram, width, name)
        H = gram.detach().double()
        problem = what_is_wrong(H)
        if problem is not None:
            raise ValueError(f"The Gram for {name} {problem}. Pass the mean of x xᵀ over the inputs x of the layer.")
        mean = (H if H.ndim == 1 else H.diagonal()).mean()
        if H.ndim == 1:
            H = (1 - damping) * H + damping * mean
            inverse = H.reciprocal()
        else:
            H = (1 - damping) / 2 * (H + H.T)
            H.diagonal().add_(damping * mean)
            root, failed = torch.linalg.cholesky_ex(H)
            if failed:
                raise ValueError(
                    f"The Gram for {name} has directions without inputs, and gram_damping={damping:g} is too small to "
                    f"make up for rounding there; take {GRAM_DAMPING:g}, for example."
                )
            inverse = torch.cholesky_inverse(root)
        dtype = torch.promote_types(gram.dtype, torch.float32)
        return cls(H.to(dtype), inverse.to(dtype))

    def __repr__(self) -> str:
        # An optimizer prints its groups, and these are large.
        return f"InputMetric{list(self.H.shape)}"

    def times(self, X: Tensor) -> Tensor:
        """X H, for X [..., in]; sharded as X is."""
        return self._times(X, self.H)

    def divide(self, X: Tensor) -> Tensor:
        """X H⁻¹, for X [..., in]; sharded as X is."""
        return self._times(X, self.inverse)

    def _times(self, X: Tensor, matrix: Tensor) -> Tensor:
        matrix = replicate_beside(matrix.to(X.device, X.dtype), X)
        return placed_like(X * matrix if matrix.ndim == 1 else X @ matrix, X)


def check_shape(gram: Tensor, width: int, name: str) -> None:
    """Complain about a Gram for inputs of another width.

    Raises:
        ValueError: naming the pair.
    """
    if tuple(gram.shape) not in ((width, width), (width,)):
        raise ValueError(
            f"The Gram for {name} has shape {list(gram.shape)}; its R takes inputs of width {width}, which need "
            f"[{width}, {width}], or [{width}] for the diagonal."
        )


def what_is_wrong(H: Tensor) -> str | None:
    """Why H, [n, n] or the diagonal [n], is no Gram; None if it is one, up to rounding."""
    if not H.isfinite().all():
        return "is not finite"
    if not (H != 0).any():
        return "is zero"
    if H.ndim == 1:
        return f"is not positive semi-definite: it has {H.min().item():.3g} on its diagonal" if H.min() < 0 else None
    largest = H.abs().sum(1).max()  # No eigenvalue is larger.
    if (H - H.T).abs().max() > 1e-3 * H.abs().max():
        return "is not symmetric"
    shifted = (H + H.T) / 2
    shifted.diagonal().add_(ROUNDING * largest)
    if torch.linalg.cholesky_ex(shifted).info != 0:
        return f"is not positive semi-definite: its least eigenvalue is {torch.linalg.eigvalsh(H)[0].item():.3g}"
    return None
