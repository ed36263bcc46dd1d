"""The output Gram matrix H_O = E[w g g^T] of a linear layer, from gradients of the model's loss at its outputs.

For y = W x and an error E of W, the model's loss rises to second order by E[(g^T E x)^2] / 2, g the gradient at y of
-log p of a sampled output. As a Kronecker product this is tr(H_O E H_I E^T) / 2 (YAQA, 2025, section 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.numerics import full_precision


@dataclass(frozen=True, eq=False)
class OutputGram:
    """The second moment of the gradients at a layer's outputs, shrunk towards a multiple of the identity.

    Attributes:
        H: [out, out] float32, symmetric; its scale has no meaning.
        shrinkage: the share of the identity, 0 to 1.
        sequences: how many were averaged.
        energy: what w |g|^2 comes to, summed over all tokens, or for each position of the model's output.
    """

    H: Tensor
    shrinkage: float
    sequences: int
    energy: float = 1.0


class OutputGramAccumulator:
    """Sums g g^T over sequences, and what tells how far the sum can be trusted.

    Args:
        out_features: m.

    Attributes:
        total: [m, m] float64, on the device of the gradients.
    """

    def __init__(self, out_features: int):
        self.total = torch.zeros(out_features, out_features, dtype=torch.float64)
        self.squares = 0.0  # Sum over sequences of the squared Frobenius norm of their sums.
        self.sequences = 0

    def update(self, gradients: Tensor) -> bool:
        """Add one sequence: gradients [tokens, out], each times the square root of its weight.

        Returns:
            Whether they are finite; nothing is added if they are not.
        """
        rows = gradients.detach().float()
        with full_precision(rows.device):
            outer = rows.T @ rows
        if not torch.isfinite(outer.diagonal()).all():
            return False
        self.total = self.total.to(outer.device).add_(outer)
        self.squares += outer.square().sum(dtype=torch.float64).item()
        self.sequences += 1
        return True

    def finish(self) -> OutputGram | None:
        """The mean, shrunk by Ledoit and Wolf's estimator; None if all gradients were zero.

        The estimator (A well-conditioned estimator for large-dimensional covariance matrices, 2004) weighs the variance
        of the mean against its distance from mu I, mu the mean diagonal. The tokens of a sequence are not independent,
        so the variance is that between sequences; one sequence alone says nothing, and gives the identity.
        """
        count = self.sequences
        if not (self.total.diagonal() > 0).any():
            return None
        mean = self.total / count
        target = torch.zeros_like(mean)
        target.diagonal().fill_(mean.diagonal().mean().item())
        distance = (mean - target).square().sum().item()
        variance = (self.squares / count - mean.square().sum().item()) / max(count - 1, 1)
        trusted = count > 1 and variance < distance
        shrinkage = max(variance / distance, 0.0) if trusted else 1.0
        H = (1 - shrinkage) * mean + shrinkage * target
        energy = self.total.diagonal().sum().item()
        return OutputGram((H / mean.diagonal().mean()).float(), shrinkage, count, energy)
