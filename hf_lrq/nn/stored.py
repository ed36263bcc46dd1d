"""What a layer stores: its low-rank part as a value, and whether a matrix fits it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hf_lrq.decomposition.compress_matrix import CompressedMatrix
from hf_lrq.layout import FACTOR_NAMES, LayerLayout


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """The low-rank part of a layer, or of a stack of them, by reference.

    Attributes:
        layout: of the whole layer.
        tensors: `FACTOR_NAMES` -> parameter or None.
    """

    layout: LayerLayout
    tensors: Mapping[str, nn.Parameter | None]

    @property
    def are_codes(self) -> bool:
        """Whether L and R are codes with scales."""
        return self.tensors["lr_L_scale"] is not None

    @property
    def rank(self) -> int:
        """Ranks of both pairs."""
        L, scale, ft_L = (self.tensors[name] for name in ("lr_L", "lr_L_scale", "ft_L"))
        own = 0 if L is None else L.shape[-1] if scale is None else scale.shape[-1]
        return own + (0 if ft_L is None else ft_L.shape[-1])


class HoldsFactors(nn.Module):
    """Mix-in for modules with parameters of `FACTOR_NAMES`, and the layout that says what they mean."""

    scales: nn.Parameter
    layout: LayerLayout

    def factors(self) -> StoredFactors:
        """The low-rank part as it is stored, to put it back later."""
        return StoredFactors(self.layout, {name: getattr(self, name) for name in FACTOR_NAMES})

    def restore(self, stored: StoredFactors) -> None:
        """Put back the low-rank part that `factors` returned; on the device that the module is on now."""
        self.layout = stored.layout
        for name, tensor in stored.tensors.items():
            if tensor is not None and tensor.device != self.scales.device:
                tensor = nn.Parameter(tensor.data.to(self.scales.device), requires_grad=False)
            self.register_parameter(name, tensor)


def check_same_layout(matrix: CompressedMatrix, layout: LayerLayout, own: Mapping[str, Tensor]) -> None:
    """Whether the tensors of `matrix` mean the same in a layer of `layout` that holds the tensors `own`.

    Raises:
        ValueError: naming the first thing that differs.
    """
    tensors = matrix.tensors()
    for name in sorted(tensors.keys() | own.keys()):
        found, expected = _described(tensors.get(name)), _described(own.get(name))
        if found != expected:
            raise ValueError(f"{name} of the matrix is {found}, the layer holds {expected}.")
    # Codes of two codebooks can have the same shape, and so can the groups of two sizes.
    fields = ["codebook"] + ["rotation_block"] * ("rot_in" in own) + ["group_size"] * (own["scales"].ndim > 1)
    for field in fields:
        if getattr(matrix.layout, field) != getattr(layout, field):
            raise ValueError(
                f"{field} of the matrix is {getattr(matrix.layout, field)!r}, of the layer {getattr(layout, field)!r}."
            )


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    # A layer can have been cast; codes never are.
    return f"{'float' if tensor.is_floating_point() else tensor.dtype} {tuple(tensor.shape)}"
