"""The input Gram matrix H = E[x x^T] of a linear layer, and the proxy loss it defines.

For a layer y = W x, replacing W by W^ changes the output by E|(W - W^) x|^2 = tr((W - W^) H (W - W^)^T). GPTQ, QuIP
and CALDERA call H "the Hessian" (it is the Hessian of that loss in a row of W, up to a factor 2); here `gram` is the
object and `H` the matrix.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_lrq.errors import CalibrationError
from hf_lrq.numerics import full_precision

FOLD_TOKENS = 2048  # float32 sums over so few tokens lose nothing that the float64 total would keep.
DAMPING_CAP = 1.0


class GramAccumulator:
    """Sums x x^T over a stream of activations: float32 products of short pieces, folded into a float64 total.

    Args:
        in_features: n.
        device: where the total is, [n, n] float64.

    Attributes:
        total: sum of x x^T.
        magnitudes: sum of |x|, [n] float64.
        cross: sum of z x^T, z the inputs in the original model, where these are other ones.
        n_tokens: how many were added.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None):
        self.total = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.magnitudes = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.cross: Tensor | None = None
        self.n_tokens = 0

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [..., in].

        Raises:
            CalibrationError: if x has another width, or holds NaN or Inf.
        """
        if x.shape[-1:] != self.total.shape[:1]:
            raise CalibrationError(f"the Gram is for {len(self.total)} inputs, got activations of {tuple(x.shape)}.")
        rows = x.detach().reshape(-1, x.shape[-1])
        for piece in rows.split(FOLD_TOKENS):
            piece = piece.float()
            # A model may be run under autocast or with TF32; its Gram is not to be a product of rounded numbers.
            with full_precision(piece.device):
                product = piece.T @ piece
            # A non-finite activation always leaves a non-finite diagonal, so one check of n numbers covers all tokens.
            if not torch.isfinite(product.diagonal()).all():
                raise CalibrationError(
                    "activations contain NaN or Inf (or squares that overflow float32). "
                    "Calibrate in bfloat16 or float32, and check the model and this batch."
                )
            self.total += product
            self.magnitudes += piece.abs().sum(0)
        self.n_tokens += rows.shape[0]

    def merge(self, other: "GramAccumulator") -> None:
        """Add what another accumulator has seen."""
        self.total += other.total.to(self.total.device)
        self.magnitudes += other.magnitudes.to(self.total.device)
        self.n_tokens += other.n_tokens

    def finish(self) -> "InputGram":
        """The mean over all tokens.

        Raises:
            CalibrationError: if no token came, or all were zero.
        """
        if self.n_tokens == 0:
            raise CalibrationError("no calibration tokens reached this layer. Route some through it, or use gram=None.")
        gram = InputGram.from_matrix((self.total / self.n_tokens).float(), self.n_tokens)
        cross = None if self.cross is None else (self.cross / self.n_tokens).float()
        return replace(gram, magnitudes=(self.magnitudes / self.n_tokens).float(), cross=cross)


@dataclass(frozen=True, eq=False)
class InputGram:
    """The second moment of a layer's inputs, not centred, not damped.

    Attributes:
        H: [in, in] float32, symmetric.
        n_tokens: tokens averaged; 0 means data-free (H = I).
        magnitudes: [in] float32, E|x_i| of each input; None where a matrix is all that was given.
        cross: [in, in] float32, E[z x^T], z the inputs in the original model; None where x are these.
    """

    H: Tensor
    n_tokens: int
    magnitudes: Tensor | None = None
    cross: Tensor | None = None

    @classmethod
    def from_matrix(cls, H: Tensor, n_tokens: int) -> "InputGram":
        """Wrap a given matrix.

        Args:
            H: [in, in] float, symmetric up to rounding.
            n_tokens: how many tokens it averages.

        Raises:
            CalibrationError: if H is not square, not finite in float32, not symmetric, or its trace is not positive.
        """
        H = H.float()
        if H.ndim != 2 or H.shape[0] != H.shape[1]:
            raise CalibrationError(f"a Gram matrix is square, got shape {tuple(H.shape)}.")
        if not torch.isfinite(H).all():
            raise CalibrationError("the Gram matrix contains NaN or Inf. Calibrate in bfloat16 or float32.")
        diagonal = H.diagonal()
        if not (diagonal > 0).any():
            raise CalibrationError(
                "the Gram matrix is zero: every calibration activation of this layer is zero. "
                "Use other calibration data, or gram=None to compress without data."
            )
        if diagonal.sum() <= 0:
            raise CalibrationError("the Gram matrix has a trace that is not positive; pass X^T X / tokens.")
        if (H - H.T).abs().max() > 1e-3 * H.abs().max():
            raise CalibrationError("the Gram matrix is not symmetric; pass X^T X / tokens.")
        return cls((H + H.T) / 2, n_tokens)

    @classmethod
    def from_inputs(cls, x: Tensor) -> "InputGram":
        """Gram of activations x [..., in].

        Raises:
            CalibrationError: if x holds no token, or NaN or Inf.
        """
        accumulator = GramAccumulator(x.shape[-1], x.device)
        accumulator.update(x)
        return accumulator.finish()

    @classmethod
    def identity(cls, in_features: int, device: torch.device | None = None) -> "InputGram":
        """The data-free Gram H = I."""
        return cls(torch.eye(in_features, device=device), 0, torch.ones(in_features, device=device))

    def damped(self, fraction: float) -> "DampedGram":
        """Normalise to mean diagonal 1 and add `fraction` of it to the diagonal; see `damp`."""
        return damp(self.H, fraction)


@dataclass(frozen=True, eq=False)
class DampedGram:
    """A positive definite Gram with mean diagonal near 1, and its factor.

    Attributes:
        H: [in, in] float32.
        M: [in, in], lower triangular, M M^T = H.
        damping: fraction of the mean diagonal that was added.
        steps: what had to be done beyond the first attempt; empty when it succeeded.
    """

    H: Tensor
    M: Tensor
    damping: float
    steps: tuple[str, ...] = field(default=())


def damp(H: Tensor, fraction: float) -> DampedGram:
    """Normalise a Gram [n, n] to mean diagonal 1 and add `fraction` of it to the diagonal.

    Where the Cholesky factorisation fails, the damping grows tenfold up to 1; then negative eigenvalues are cut. Each
    step is recorded.
    """
    H = H / H.diagonal().mean()
    steps: list[str] = []
    while fraction <= DAMPING_CAP:
        damped = H + fraction * torch.eye(len(H), device=H.device)
        M, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0 and torch.isfinite(M).all():
            return DampedGram(damped, M, fraction, tuple(steps))
        steps.append(f"Cholesky failed with damping {fraction:g}")
        fraction *= 10
    eigenvalues, vectors = torch.linalg.eigh(H.double())
    steps.append(f"negative eigenvalues cut, the least was {eigenvalues.min().item():.3g}")
    kept = (vectors * eigenvalues.clamp(min=0)) @ vectors.T
    kept.diagonal().add_(DAMPING_CAP)
    return DampedGram(kept.float(), torch.linalg.cholesky(kept).float(), DAMPING_CAP, tuple(steps))


def marginalise(gram: DampedGram, R: Tensor, damping: float) -> Tensor:
    """M (I - V V^T) M^T + damping * mean diagonal, V an orthonormal basis of the rows of R M.

    With damping 0 and E = W - Q, tr(E H E^T) under this matrix is the exact loss of Q once L is refitted to E, R fixed:
    errors that L will repair cost nothing. Without rows it is the Gram itself.

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


def weighted_square(E: Tensor, H: Tensor, H_out: Tensor | None = None) -> float:
    """tr(H_out E H E^T), summed in float64; without H_out, tr(E H E^T)."""
    weighted = E @ H if H_out is None else H_out @ (E @ H)
    return (weighted * E).sum(dtype=torch.float64).item()


def proxy_loss(W: Tensor, W_hat: Tensor, H: Tensor, H_out: Tensor | None = None) -> float:
    """Relative proxy loss tr((W - W^) H (W - W^)^T) / tr(W H W^T); 0 is exact, 1 is as bad as W^ = 0.

    With H_out [out, out], the products have it in front: tr(H_out E H E^T).

    An all-zero W has loss 0 if W^ is zero as well, else infinity.

    >>> W, H = torch.eye(2), torch.diag(torch.tensor([1.0, 3.0]))
    >>> proxy_loss(W, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), H)
    0.75
    """
    return relative_loss(weighted_square(W - W_hat, H, H_out), weighted_square(W, H, H_out))


def relative_loss(error: float, energy: float) -> float:
    """Their ratio; without energy 0 if there is no error, else infinity."""
    if energy == 0:
        return 0.0 if error == 0 else float("inf")
    return error / energy
