"""Whether the small tensors of compressed layers hold what they can hold: finite numbers, and signs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_lrq.layout import TENSOR_NAMES, LayerLayout
from hf_lrq.nn.embedding import LRQEmbedding
from hf_lrq.nn.experts import LRQExpertStack
from hf_lrq.nn.linear import LRQLinear

ROTATION_NAMES = ("rot_in", "rot_out")


@dataclass(frozen=True)
class Unsound:
    """A tensor with values that it cannot have.

    Attributes:
        name: full name.
        expected: "finite numbers" or "signs, 1 and -1".
        low, high: smallest and largest value found; of signs, of their magnitudes; NaN where there is one.
    """

    name: str
    expected: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, found values from {self.low:g} to {self.high:g}"


def unsound_tensors(model: nn.Module) -> list[Unsound]:
    """Scales, rotations and factors of compressed layers with values that a compression never gives.

    All values are read once, where they are, and waited for once per device. Tensors on the meta device are passed
    over. Rotations are signs unless the layout says that they were trained.
    """
    return _faults(_checked(model))


def unsound_values(name: str, layout: LayerLayout, tensors: Mapping[str, Tensor]) -> list[Unsound]:
    """`unsound_tensors` of one matrix or stack, by the tensors that are stored of it."""
    return _faults(_to_check(name, layout, tensors))


@torch.no_grad()
def _faults(checked: Iterable[tuple[str, Tensor, bool]]) -> list[Unsound]:
    ranges: dict[torch.device, list[Tensor]] = {}
    names: dict[torch.device, list[tuple[str, bool]]] = {}
    for name, tensor, signs in checked:
        low, high = torch.aminmax(tensor.abs() if signs else tensor)
        ranges.setdefault(tensor.device, []).append(torch.stack((low, high)).float())
        names.setdefault(tensor.device, []).append((name, signs))
    found = []
    for device, each in ranges.items():
        values = torch.stack(each).tolist()
        for (name, signs), (low, high) in zip(names[device], values, strict=True):
            if signs and (low, high) != (1.0, 1.0):
                found.append(Unsound(name, "signs, 1 and -1", low, high))
            elif not signs and not (abs(low) < torch.inf and abs(high) < torch.inf):
                found.append(Unsound(name, "finite numbers", low, high))
    return found


def are_signs(rotations: Iterable[Tensor | None]) -> bool:
    """Whether all values are 1 and -1; tensors on the meta device count as signs."""
    return all((r.abs() == 1).all() for r in rotations if r is not None and r.device.type != "meta")


def _checked(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for prefix, module in model.named_modules():
        if isinstance(module, LRQLinear | LRQExpertStack | LRQEmbedding):
            stored = {name: tensor for name in TENSOR_NAMES if (tensor := getattr(module, name)) is not None}
            yield from _to_check(prefix, module.layout, stored)


def _to_check(prefix: str, layout: LayerLayout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, and whether it must be signs."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.device.type != "meta" and tensor.numel():
            yield f"{prefix}.{name}", tensor, name in ROTATION_NAMES and layout.rotation == "hadamard"
