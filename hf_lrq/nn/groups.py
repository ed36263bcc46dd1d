"""Layers of one input, computed together: q, k and v of an attention, gate and up of an MLP.

They need the transform of their input once and, on a GPU, one launch for all. The model's own code stays as it is: it
calls one layer after the other, the first call computes all of them, the others find their outputs ready. No output is
held beyond the forward of the module they belong to, and what they are computed from is read when the first of them is
called, so that adapters, merged weights and moves to other devices are seen.
"""

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.kernels import linear_group
from hf_lrq.kernels.stacks import can_stand_side_by_side, side_by_side
from hf_lrq.layout import TENSOR_NAMES
from hf_lrq.nn.linear import LRQLinear

logger = logging.getLogger(__name__)

# Names, in one module, of layers that models call with the same input.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
WRAPPED = ".base_layer"  # How PEFT calls the layer in an adapter.
PATIENCE = 2  # Forwards in a row in which nobody asked for an output before it is no longer computed.


@dataclass(eq=False)
class _Held:
    """Outputs for x, computed in some way, that have not been asked for yet, by position of the layer."""

    x: Tensor
    way: Hashable
    ready: dict[int, Tensor]


class LinearGroup:
    """Layers that are computed together while `owner` runs.

    Copies of a member that are not part of a copy of the whole do not belong to the group.

    Args:
        names: of the members in `owner`, for messages.
        members: of one input width, codebook and device, and with equal rot_in.
        owner: the module that calls them.
    """

    def __init__(self, names: Sequence[str], members: Sequence[LRQLinear], owner: nn.Module):
        self.names, self.members = tuple(names), tuple(members)
        self._running = False  # the owner; where several threads run it, some of their layers compute alone
        self._held: _Held | None = None
        self._adapted: set[int] = set()
        self._ignored = [0] * len(members)
        _put_side_by_side(members)
        self._rotations = self._written()
        for member in members:
            member.group = self
        self._hooks = (
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end, always_call=True),
        )

    def output(self, member: LRQLinear, x: Tensor, adapted: bool) -> Tensor | None:
        """What `member` gives for x, perhaps computed earlier; None if it has to compute alone.

        Args:
            adapted: its factors are replaced for this call, so that it computes alone whatever happens.
        """
        own = next((i for i, each in enumerate(self.members) if each is member), None)
        if own is None:
            return None
        if adapted:
            self._adapted.add(own)
            return None
        self._adapted.discard(own)
        if not self._running or not self._alike(x):
            return None
        held, way = self._held, _way(member, x)
        if held is not None and held.x is x and held.way == way:
            ready = held.ready.pop(own, None)
            if ready is not None:
                self._ignored[own] = 0
                return ready
        together = [i for i, _ in enumerate(self.members) if i not in self._adapted and self._ignored[i] < PATIENCE]
        if own not in together or len(together) < 2:
            return None
        layers = [self.members[i].operands() for i in together]
        if x.is_cuda and (torch.compiler.is_compiling() or self._rotations == self._written()):
            # Equal when the group was made, and nobody has written to them since.
            layers = [layer._replace(rot_in=layers[0].rot_in) for layer in layers]
        outputs = dict(zip(together, linear_group(x, layers, *member.way), strict=True))
        y = outputs.pop(own)
        self._held = _Held(x, way, outputs)
        return y

    def dissolve(self) -> None:
        """Each member on its own again, and in memory of its own."""
        for hook in self._hooks:
            hook.remove()
        self._held = None
        for member in self.members:
            member.group = None
        _own_memory(self.members)

    def _written(self) -> list[Hashable]:
        """Changes when a rotation is replaced or written to, other than through `.data`."""
        rotations = [member.rot_in for member in self.members]
        return [None if t is None or t.is_inference() else (t.data_ptr(), t._version) for t in rotations]

    def _alike(self, x: Tensor) -> bool:
        """Whether one call can compute all members, and nobody wants a gradient."""
        first = self.members[0]
        wants_gradient = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for member in self.members for p in member.parameters())
        )
        return not wants_gradient and all(
            member.weight.device == x.device  # not offloaded
            and member.way == first.way
            for member in self.members
        )

    def _begin(self, *_: Any) -> None:
        self._running = True

    def _end(self, *_: Any) -> None:
        self._running = False
        held, self._held = self._held, None
        for index in () if held is None else held.ready:
            self._ignored[index] += 1
            if self._ignored[index] == PATIENCE:
                logger.info("hf_lrq: %s is not called with the input of its group; computed alone", self.names[index])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None, "_running": False}


def fuse_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Let compressed layers of one input be computed together, see `SAME_INPUT`.

    Outputs stay the same: bit for bit on CPUs, up to the order of sums on GPUs.

    Layers are found by name, also inside adapters. Those of one group have equal rotations of the input, and the same
    codebook and device; others stay alone. While gradients are wanted each computes alone. On GPUs, layers are copied
    one after the other in memory, where that lets one launch compute them. To be called again after the model was moved
    to another device or, on a GPU, its rotations were changed through `.data` or after it was compiled. In compiled
    code and in inference mode a module must not write to the input between two layers of a group (none in transformers
    does); elsewhere that is noticed.

    Returns:
        Name of the module -> names of the layers in it that are computed together; with two groups in one module, the
        names of the second follow those of the first.
    """
    unfuse_layers(model)
    found: dict[str, tuple[str, ...]] = {}
    for name, owner, candidates in _candidates(model):
        alike: dict[Hashable, list[str]] = {}
        for role, layer in candidates.items():
            alike.setdefault(_key(layer), []).append(role)
        for roles in alike.values():
            if len(roles) > 1:
                LinearGroup([f"{name}.{role}" for role in roles], [candidates[role] for role in roles], owner)
                found[name] = (*found.get(name, ()), *roles)
    return found


def group_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Equal for layers that one input may reach, by their names: the module they are in, and their roles there.

    >>> group_of("layers.0.mlp.up_proj")
    ('layers.0.mlp', ('gate_proj', 'up_proj'))
    """
    owner, _, own = name.rpartition(".")
    return next(((owner, roles) for roles in SAME_INPUT if own in roles), None)


def unfuse_layers(model: nn.Module) -> None:
    """Undo `fuse_layers`."""
    for module in model.modules():
        if isinstance(module, LRQLinear) and module.group is not None:
            module.group.dissolve()


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, LRQLinear]]]:
    """Module by module: name, module, and layers in it that share an input by name."""
    children: dict[str, dict[str, LRQLinear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LRQLinear):
            owner, _, role = name.removesuffix(WRAPPED).rpartition(".")
            children.setdefault(owner, {})[role] = module
    for owner, layers in children.items():
        for roles in SAME_INPUT:
            yield owner, model.get_submodule(owner), {role: layers[role] for role in roles if role in layers}


def _key(layer: LRQLinear) -> Hashable:
    """Equal for layers that one call can compute."""
    layout, rot_in = layer.layout, layer.rot_in
    if layer.weight.device.type == "meta" or (rot_in is not None and rot_in.requires_grad):
        return id(layer)  # offloaded, or trained
    rotation = None if rot_in is None else (rot_in.dtype, tuple(rot_in.tolist()))
    return (layer.in_features, layout.codebook, layout.group_size, layout.rotation_block, layer.weight.device, rotation)


@torch.no_grad()
def _put_side_by_side(members: Sequence[LRQLinear]) -> None:
    """On GPUs, as a kernel takes several layers for one; see `kernels.stacks`."""
    for name in (*TENSOR_NAMES, "bias") if members[0].weight.is_cuda else ():
        tensors = [tensor for member in members if (tensor := getattr(member, name)) is not None]
        if name != "rot_in" and len(tensors) == len(members) and can_stand_side_by_side(tensors):
            for tensor, view in zip(tensors, side_by_side(tensors), strict=True):
                tensor.data = view


@torch.no_grad()
def _own_memory(members: Sequence[LRQLinear]) -> None:
    tensors = [parameter for member in members for parameter in member.parameters()]
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    for tensor, place in zip(tensors, places, strict=True):
        if places.count(place) > 1:
            tensor.data = tensor.data.clone()


def _way(member: LRQLinear, x: Tensor) -> Hashable:
    """All that an output depends on beside the layer; not whether x was written to meanwhile, in compiled code."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    version = None if torch.compiler.is_compiling() or x.is_inference() else x._version
    return member.way, autocast, version
