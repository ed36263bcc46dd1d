"""Incoherence processing: random Hadamard rotations spread outliers over many coordinates (QuIP#, 2024, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.kernels import hadamard


@dataclass(frozen=True, eq=False)
class RandomHadamard:
    """The orthogonal map V x = H (s * x) on the last axis, H block-diagonal.

    Attributes:
        signs: [n] float of +-1.
        largest: largest Hadamard block; n = 96 is rotated in three blocks of 32, odd n by signs only.
    """

    signs: Tensor
    largest: int = 256

    @classmethod
    def sample(cls, n: int, generator: torch.Generator, largest: int = 256) -> "RandomHadamard":
        """Random signs; drawn on the generator's device."""
        bits = torch.randint(0, 2, (n,), generator=generator, device=generator.device)
        return cls(bits * 2.0 - 1.0, largest)

    def apply(self, x: Tensor) -> Tensor:
        """V x, [..., n] -> [..., n]."""
        return hadamard(x * self.signs.to(x), self.largest)

    def undo(self, x: Tensor) -> Tensor:
        """V^T x, the inverse of `apply`."""
        return hadamard(x, self.largest) * self.signs.to(x)

    def rotate_gram(self, H: Tensor) -> Tensor:
        """V H V^T, the Gram of the rotated inputs V x; exactly symmetric."""
        rotated = self.apply(self.apply(H).T)
        return (rotated + rotated.T) / 2
