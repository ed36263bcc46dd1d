"""What a compressed layer is computed from, as one value."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lrq.factors import concatenated, stored_pairs
from hf_lrq.layout import LayerLayout
from hf_lrq.matrices import Pair


class Operands(NamedTuple):
    """Stored tensors of one layer and how to read them, in the order of the operator's arguments.

    See `layout.LayerLayout` for shapes and dtypes. L and R may also be floats of any dtype without scales.
    """

    weight: Tensor
    scales: Tensor
    rot_in: Tensor | None
    rot_out: Tensor | None
    L: Tensor | None
    R: Tensor | None
    L_scale: Tensor | None
    R_scale: Tensor | None
    bias: Tensor | None
    codebook: str
    group_size: int
    block: int

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        layout: LayerLayout,
        bias: Tensor | None = None,
        pair: Pair | None = None,
    ) -> "Operands":
        """What a layer of `layout` is computed from.

        Args:
            tensors: name -> stored tensor, see `layout.LayerLayout.tensors`; those of the layout.
            layout: of the tensors.
            bias: [out] or None.
            pair: float factors that are applied in the place of the stored ones.
        """
        get = tensors.get
        if pair is None and "ft_L" in tensors:
            # One product with all ranks, as floats, needs the rotations only once.
            pair = concatenated(stored_pairs(tensors))
        L, R = pair or (get("lr_L"), get("lr_R"))
        L_scale, R_scale = (get("lr_L_scale"), get("lr_R_scale")) if pair is None else (None, None)
        own = (tensors["weight"], tensors["scales"], get("rot_in"), get("rot_out"))
        form = (layout.codebook, layout.group_size, layout.rotation_block)
        return cls(*own, L, R, L_scale, R_scale, bias, *form)

    @classmethod
    def of_stack(cls, tensors: Mapping[str, Tensor], layout: LayerLayout) -> "Operands":
        """What a stack of layers of one layout is computed from: each tensor has a leading axis of them.

        Args:
            tensors: name -> stored tensors of all, one above the other.
            layout: of each layer.
        """
        pair = None
        if "ft_L" in tensors:
            factors = {name: stack for name, stack in tensors.items() if name.startswith(("lr_", "ft_"))}
            pair = torch.vmap(lambda one: concatenated(stored_pairs(one)))(factors)
        return cls.of(tensors, layout, pair=pair)

    def layer(self, index: int) -> "Operands":
        """One layer of a stack."""
        one = (None if stack is None else stack[index] for stack in self.tensors)
        return Operands._make((*one, *self[TENSORS:]))

    @property
    def out_features(self) -> int:
        """Number of rows without padding."""
        return self.scales.shape[0]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, in order."""
        tensors: tuple[Any, ...] = self[:TENSORS]
        return tensors

    @property
    def rank(self) -> int:
        """Number of ranks of L R."""
        if self.R is None:
            return 0
        return self.R.shape[0] if self.R_scale is None else self.R_scale.shape[0]


TENSORS = 9  # Fields that are tensors.


def by_field(layers: Sequence[Operands]) -> tuple[list[Tensor | None], ...]:
    """Fields of several layers of one format as the grouped operator takes them: for each tensor field, a list."""
    return tuple(list(field) for field in zip(*(layer.tensors for layer in layers), strict=True))


def by_layer(fields: Sequence[Sequence[Tensor | None]], codebook: str, group_size: int, block: int) -> list[Operands]:
    """Inverse of `by_field`."""
    return [Operands._make((*tensors, codebook, group_size, block)) for tensors in zip(*fields, strict=True)]


def one_by_one(
    x: Tensor,
    counts: Sequence[int],
    stacks: Sequence[Operands],
    compute: Callable[[Tensor, list[Operands]], Sequence[Tensor]],
) -> list[Tensor]:
    """Sorted rows through stacks of layers, see `ops.linear_experts`, by a function for the rows of one expert.

    Args:
        x: [n, in].
        counts: how many rows each expert gets.
        stacks: see `Operands.of_stack`.
        compute: some rows and a layer of each stack -> an output of each.

    Returns:
        One tensor [n, out] for each stack; zeros in rows that no expert gets.
    """
    outputs = [x.new_zeros(len(x), stack.scales.shape[1]) for stack in stacks]
    start = 0
    for expert, count in enumerate(counts):
        if count:
            own = slice(start, start + count)
            for y, found in zip(outputs, compute(x[own], [stack.layer(expert) for stack in stacks]), strict=True):
                y[own] = found
            start += count
    return outputs
