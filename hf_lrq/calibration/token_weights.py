"""How much each token counts in the Gram of a layer's inputs: by the gradient at its output, as far as that is known.

Tokens do not matter alike: what reads from the first position, an attention sink, is most of what a model says, and one
token in thousands. The squared norm of the gradient tells (GuidedQuant, 2025), but from one drawn label a token it is
noisy, so the weighted Gram is shrunk towards the plain one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_lrq.decomposition import generator_for

SKETCH, CLUSTERS = 32, 64

# Batch -> weights [*leading axes of the input] of each call of a module.
Weights = Mapping[int, Sequence[Tensor]]


class TokenWeights:
    """Weights of the tokens that reach one matrix.

    The weighted Gram is (1 - s) sum w x x^T / c + s sum x x^T, c such that both have one trace. The shrinkage s is that
    of Ledoit and Wolf (2004) with the plain Gram as its target: the variance of the weighted Gram, between sequences
    and apart from its trace, over its squared distance from the target. Both are measured on a random projection of the
    inputs, which keeps their ratio.

    Args:
        in_features: of the matrix.

    Attributes:
        shrinkage: s, 0 to 1; 1 means equal weights. Set by `finish`.
    """

    def __init__(self, in_features: int):
        generator = generator_for(0, f"sketch/{in_features}")
        self._basis = torch.randn(in_features, min(SKETCH, in_features), generator=generator)
        size = self._basis.shape[1]
        self._weighted = torch.zeros(CLUSTERS, size, size, dtype=torch.float64)
        self._plain = torch.zeros(size, size, dtype=torch.float64)
        self._traces = torch.zeros(CLUSTERS, dtype=torch.float64)
        self._trace = 0.0
        self._sequences = 0
        self._raw: dict[int, list[Tensor]] = {}
        self.shrinkage = 1.0

    def update(self, batch: int, x: Tensor, weights: Tensor) -> None:
        """Add one call.

        Args:
            batch: its number.
            x: [..., tokens, in] inputs.
            weights: [..., tokens] float32, at least 0; zero where a token is masked.
        """
        self._raw.setdefault(batch, []).append(weights.cpu())
        self._basis = self._basis.to(x.device)
        rows = x.float() if x.ndim > 2 else x.float().unsqueeze(0)
        for sequence, weight in zip(rows.flatten(1, -2), weights.reshape(len(rows), -1), strict=True):
            squares = sequence.square().sum(-1)
            sketch = sequence @ self._basis
            cluster = self._sequences % CLUSTERS
            self._weighted[cluster] += (sketch.T @ (weight[:, None] * sketch)).cpu()
            self._plain += (sketch.T @ sketch).cpu()
            self._traces[cluster] += (weight * squares).sum().item()
            self._trace += squares.sum().item()
            self._sequences += 1

    def finish(self) -> Weights:
        """Weights to multiply x x^T with; about 1 in the mean."""
        total, trace = self._weighted.sum(0), self._traces.sum().item()
        clusters = min(self._sequences, CLUSTERS)
        if clusters > 1 and trace > 0 and self._trace > 0:
            spread = self._weighted[:clusters] - (self._traces[:clusters] / trace)[:, None, None] * total
            variance = spread.square().sum().item() * clusters / (clusters - 1)
            distance = (total - trace / self._trace * self._plain).square().sum().item()
            self.shrinkage = 1.0 if variance >= distance else variance / distance
        scale = (1 - self.shrinkage) * self._trace / trace if self.shrinkage < 1 else 0.0
        return {batch: [scale * raw + self.shrinkage for raw in calls] for batch, calls in self._raw.items()}
