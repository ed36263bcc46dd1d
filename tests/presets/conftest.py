"""A small layer in float64, and schedules run on it with nothing rounded but Q, so that closed forms hold to 1e-10."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from hf_lrq.decomposition import InputGram, WhitenedSVD, decompose, get_schedule
from hf_lrq.decomposition.gram import damp
from hf_lrq.decomposition.metric import METRICS, OUTPUT_METRICS
from hf_lrq.decomposition.quantizers import Quantizer, unit_upper
from hf_lrq.decomposition.rotated import Rotated
from hf_lrq.decomposition.starts import STARTS, Setting
from hf_lrq.integrations.config import LRQConfig

STEP = 0.5  # Of the grid that Q lies on.


@dataclass(frozen=True, eq=False)
class Values:
    """A matrix that is stored as it is."""

    values: Tensor

    def dequantize(self):
        return self.values

    def dense(self):
        return self.values


@dataclass(frozen=True, eq=False)
class Product:
    L: Values
    R: Values

    def dense(self):
        return self.L.values @ self.R.values


class Exact(WhitenedSVD):
    """Factors are stored in float64."""

    def store(self, L, R):
        return Product(Values(L), Values(R))


@dataclass(frozen=True)
class Grid(Quantizer):
    """Multiples of a step: the nearest, or with feedback from column to column."""

    codebook: str = "none"
    feedback: bool = False
    group_size: int = field(default=0)

    @property
    def feeds_back(self):
        return self.feedback

    def quantize(self, W, H):
        return Values(rounded(W, H if self.feedback else torch.eye(len(H), dtype=H.dtype)))

    def refine(self, W, H, previous):
        return previous

    def zero(self, W):
        return Values(torch.zeros_like(W))


def rounded(W, H):
    """Multiples of the step by LDLQ, column by column (QuIP, 2023, equation 2); with H = I, the nearest."""
    U, Q = unit_upper(H, 1), torch.zeros_like(W)
    for k in range(W.shape[1]):
        Q[:, k] = STEP * ((W[:, k] + (W - Q)[:, :k] @ U[:k, k]) / STEP).round()
    return Q


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight [24, 32], 400 inputs, gradients at the outputs, and their moments, in float64."""

    W: Tensor
    x: Tensor
    g: Tensor

    @property
    def H(self):
        return self.x.T @ self.x / len(self.x)

    @property
    def H_out(self):
        return self.g.T @ self.g / len(self.g)

    @property
    def gram(self):
        return InputGram(self.H, len(self.x), self.x.abs().mean(0))

    def run(self, name, rank, **options):
        """(Q, L R) of a preset, without damping and rotation."""
        config = LRQConfig(preset=name, rank=rank, **options)
        spec = config.spec.default
        gram, fit = damp(self.H, 0.0), damp(METRICS[spec.metric](self.gram), 0.0)
        output = damp(self.H_out, 0.0) if config.two_sided else None
        weigh = OUTPUT_METRICS.get(spec.metric, Tensor.clone)
        fit_output = damp(weigh(self.H_out), 0.0) if config.two_sided else None
        generator = torch.Generator().manual_seed(0)
        at = Setting(self.W, self.H, Rotated(self.W, gram, fit, output, None, None, fit_output), rank, generator)
        found = decompose(
            self.W,
            gram,
            Grid(feedback=spec.rounding == "ldlq"),
            Exact(rank),
            generator,
            start=STARTS[spec.init](at),
            schedule=get_schedule(spec.schedule, spec.iters),
            fit=fit,
            output=output,
            fit_output=fit_output,
        )
        return found.quantized.dequantize(), found.low_rank.dense()


@pytest.fixture(scope="module", name="rounded")
def rounding():
    """W, H -> Q."""
    return rounded


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(3)
    U, _, V = torch.linalg.svd(torch.randn(24, 32, generator=generator, dtype=torch.float64), full_matrices=False)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(400, 32, generator=generator, dtype=torch.float64) * torch.logspace(0.5, -0.7, 32) @ basis
    x[:, 5] *= 8  # An outlier.
    g = torch.randn(400, 24, generator=generator, dtype=torch.float64) * torch.logspace(0.3, -0.8, 24)
    return Layer(U * torch.linspace(6, 0.5, 24, dtype=torch.float64) @ V, x, g)
