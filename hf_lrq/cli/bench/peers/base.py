"""A peer: a library that rounds matrices, whose results are put into a dense model and whose bytes are counted."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_lrq.cli.bench.candidates import Candidate, Compressed, Material, in_file, linear_layers
from hf_lrq.evaluation import Size
from hf_lrq.evaluation.sizes import StoredTensor
from hf_lrq.safetensors_headers import dtype_name, header_bytes


@dataclass(frozen=True)
class Peer(Candidate):
    """One variant of what another library does.

    Attributes:
        variant: one of `variants`.
    """

    variants: ClassVar[tuple[str, ...]]
    variant: str

    @property
    def name(self) -> str:
        """Family and variant."""
        return f"{self.by}:{self.variant}"

    @classmethod
    def knows(cls, variant: str) -> bool:
        """Whether there is such a variant."""
        return variant in cls.variants

    @abstractmethod
    def missing(self, material: Material) -> str | None:
        """Why it cannot run here and what to do; None if it can."""


@dataclass(frozen=True)
class Rounded:
    """A matrix as a peer stores it.

    Attributes:
        dense: [out, in], the weight that its product applies.
        tensors: what its file holds, by the last part of their names.
    """

    dense: Tensor
    tensors: Mapping[str, Tensor]


class MatrixPeer(Peer):
    """A peer that rounds one matrix after another, without data; its file is one of safetensors.

    Linear layers but the output head are rounded, as these libraries do by themselves.
    """

    package: ClassVar[str]

    @abstractmethod
    def round(self, layer: nn.Linear) -> Rounded:
        """The weight of a layer, rounded."""

    def missing(self, material: Material) -> str | None:
        """Whether the package is there."""
        return None if find_spec(self.package) else f"not installed. Run: pip install {self.package}"

    def libraries(self) -> Sequence[str]:
        """The package."""
        return (self.package,)

    @torch.no_grad()
    def compress(self, model: nn.Module, material: Material) -> Compressed:
        """Round every linear layer but the head."""
        replaced = {}
        for name, layer in linear_layers(model):
            rounded = self.round(layer)
            layer.weight.copy_(rounded.dense)
            replaced[f"{name}.weight"] = stored_as(name, rounded.tensors, layer.weight.numel())
        return Compressed(safetensors_size(in_file(model, material.stored, replaced)))


def stored_as(name: str, tensors: Mapping[str, Tensor], weights: int) -> list[StoredTensor]:
    """What a file holds in place of a matrix of so many weights, which the first tensor stands for."""
    return [
        StoredTensor(
            f"{name}.{part}", dtype_name(tensor.dtype), tuple(tensor.shape), "compressed", 0 if index else weights
        )
        for index, (part, tensor) in enumerate(tensors.items())
    ]


def safetensors_size(tensors: Sequence[StoredTensor]) -> Size:
    """Size of a safetensors file without the digests that ours carry."""
    headers = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    return replace(Size.of(tensors), header_bytes=header_bytes(headers, {"format": "pt"}))
