"""The compressed linear layer: y = rot_out * H_out(Q z + L (R z)) + bias, z = H_in(rot_in * x)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from hf_lrq.decomposition.compress_matrix import CompressedMatrix
from hf_lrq.factors import concatenated, dense_pair, in_float16
from hf_lrq.kernels import Operands, explain, hadamard, linear
from hf_lrq.layout import FACTOR_NAMES, TENSOR_NAMES, LayerLayout
from hf_lrq.matrices import Pair, QuantizedMatrix
from hf_lrq.nn.stored import HoldsFactors, StoredFactors, check_same_layout


class FusedGroup(Protocol):
    """Layers that are computed together, as one of them knows them; see `groups.LinearGroup`."""

    def output(self, member: "LRQLinear", x: Tensor, adapted: bool) -> Tensor | None:
        """What the member gives for x; None if it has to compute alone."""

    def dissolve(self) -> None:
        """Each on its own again."""


class LRQLinear(HoldsFactors, nn.Linear):
    """A linear layer stored as packed codes of Q, the factors L and R, and the signs of two rotations.

    A subclass of nn.Linear, so that PEFT's "all-linear" and every isinstance check find it. All state is in
    parameters: buffers are broadcast by DDP and refused by FSDP2. All of them start frozen; the float ones can train.

    Args:
        in_features, out_features: of the uncompressed layer.
        bias: whether there is one.
        layout: of the stored tensors.
        device: where to make them.
        dtype: of the bias; the other tensors have the dtypes of the layout.

    Attributes:
        weight: uint8, see `Codebook.packed_shape`; three axes, so that it can never pass for an [out, in] weight.
        scales, rot_in, rot_out, lr_L, lr_R, lr_L_scale, lr_R_scale, ft_L, ft_R: see `layout.LayerLayout.tensors`; None
            where the layout has no such tensor.
        backend, activation: how it is computed, see `kernels.linear`; no part of what is stored. In training mode the
            activation is "float", also without gradients: reentrant checkpointing runs a layer without them first, and
            the loss of that pass must be the one that is differentiated. A new layer is in evaluation mode.
        group: layers it is computed with, see `groups.fuse_layers`.
    """

    backend = "auto"
    activation = "float"
    group: "FusedGroup | None" = None

    scales: nn.Parameter
    rot_in: nn.Parameter | None
    rot_out: nn.Parameter | None
    lr_L: nn.Parameter | None
    lr_R: nn.Parameter | None
    lr_L_scale: nn.Parameter | None
    lr_R_scale: nn.Parameter | None
    ft_L: nn.Parameter | None
    ft_R: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: LayerLayout,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's own would allocate the full weight.
        self.training = False
        self.in_features, self.out_features, self.layout = in_features, out_features, layout
        stored = layout.tensors(out_features, in_features)
        for name in TENSOR_NAMES:
            tensor = stored.get(name)
            empty = None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            self.register_parameter(name, None if empty is None else nn.Parameter(empty, requires_grad=False))
        b = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if b is None else nn.Parameter(b, requires_grad=False))
        self._is_hf_initialized = True  # transformers must not "initialise" codes it finds under `weight`.

    @classmethod
    def from_matrix(cls, matrix: CompressedMatrix, bias: Tensor | None = None) -> "LRQLinear":
        """A layer that holds `matrix`, on its device.

        Args:
            matrix: from `compress_matrix`.
            bias: [out] or None; its dtype is kept.
        """
        out_features, in_features = matrix.shape
        layer = cls(
            in_features,
            out_features,
            bias is not None,
            matrix.layout,
            device=matrix.decomposition.quantized.packed.device,
            dtype=None if bias is None else bias.dtype,
        )
        layer.load_matrix(matrix)
        if bias is not None:
            layer.bias.data.copy_(bias.detach())
        return layer

    def load_matrix(self, matrix: CompressedMatrix) -> None:
        """Take over the tensors of `matrix`, which must have this layer's layout.

        Raises:
            ValueError: if the layouts differ; the layer is then unchanged.
        """
        check_same_layout(matrix, self.layout, self.stored_tensors())
        for name, tensor in matrix.tensors().items():
            getattr(self, name).data.copy_(tensor)

    @property
    def rank(self) -> int:
        """Ranks of L R, those of a second pair not counted."""
        if self.lr_L is None:
            return 0
        return len(self.lr_L_scale) if self.lr_L_scale is not None else self.lr_L.shape[1]

    @property
    def ft_rank(self) -> int:
        """Ranks of the second pair."""
        return 0 if self.ft_L is None else self.ft_L.shape[1]

    def forward(self, x: Tensor, adapt: Callable[[Tensor, Tensor], Pair] | None = None) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x.

        Args:
            x: [..., in].
            adapt: of the factors, see `low_rank`, makes those that are applied instead. Called in here, where weights
                that are offloaded are at hand.

        Raises:
            ValueError: if x has the wrong width, is not floating point, or lies on another device.
        """
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"LRQLinear({self.in_features}, {self.out_features}) takes floating-point inputs of width "
                f"{self.in_features}, got {x.dtype} of shape {tuple(x.shape)}."
            )
        if x.device != self.weight.device:
            raise ValueError(
                f"LRQLinear({self.in_features}, {self.out_features}) is on {self.weight.device}, the input on "
                f"{x.device}. Move one of them with .to()."
            )
        if self.group is not None and (y := self.group.output(self, x, adapt is not None)) is not None:
            return y
        return linear(x, self.operands(adapt), *self.way)

    @property
    def way(self) -> tuple[str, str]:
        """Backend and activation of a call."""
        return self.backend, "float" if self.training else self.activation

    def operands(self, adapt: Callable[[Tensor, Tensor], Pair] | None = None) -> Operands:
        """What the layer is computed from; for `adapt` see `forward`."""
        pair = None if adapt is None else adapt(*self.low_rank())
        return Operands.of(self.stored_tensors(), self.layout, self.bias, pair)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of the format; without the bias."""
        return {name: tensor for name in TENSOR_NAMES if (tensor := getattr(self, name)) is not None}

    def runs_on(self, dtype: torch.dtype = torch.float32) -> str:
        """The backend that computes this layer for inputs of `dtype`, or "torch" and why it is not a faster one."""
        x = torch.empty(1, self.in_features, dtype=dtype, device=self.weight.device)
        return explain(x, self.operands(), self.backend, self.activation)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight this layer applies, [out, in]; computed in float32."""
        W = QuantizedMatrix(
            self.weight, self.scales, self.layout.codebook, self.in_features, self.layout.group_size
        ).dequantize()
        L, R = self.low_rank()
        W = W + L.float() @ R.float()
        block = self.layout.rotation_block
        if self.rot_in is not None:
            W = hadamard(W, block) * self.rot_in.float()
        if self.rot_out is not None:
            W = hadamard(W.T, block).T * self.rot_out.float().unsqueeze(1)
        return W.to(dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An uncompressed nn.Linear with the same weight, in `dtype` (default: that of the bias, else float32)."""
        dtype = dtype or (self.bias.dtype if self.bias is not None else torch.float32)
        device = self.weight.device
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        plain.weight = nn.Parameter(self.dense(dtype), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(device=device, dtype=dtype, copy=True), requires_grad=False)
        return plain

    # The low-rank part as a value: read, grown, replaced, put back. Q is never touched.

    def low_rank(self) -> Pair:
        """L [out, r] and R [r, in] as floats, where r is rank + ft_rank; in the rotated basis."""
        return dense_pair(self.factors().tensors, self.out_features, self.in_features, self.scales)

    def absorb(self, L: Tensor, R: Tensor) -> None:
        """Add the product L R to the low-rank part, rounded to float16 once.

        Float16 factors gain ranks. Factors stored as codes stay as they are; the pair goes to ft_L and ft_R.

        Args:
            L, R: [out, k] and [k, in] float, in the rotated basis, see `rotated`.

        Raises:
            FloatingPointError: if they are not finite in float16; the layer is then unchanged.
        """
        if self.lr_L_scale is None:
            self.replace_factors(*concatenated([self.low_rank(), (L, R)]))
            return
        if self.ft_L is not None and self.ft_R is not None:
            L, R = concatenated([(self.ft_L, self.ft_R), (L, R)])
        L, R = in_float16(L, R)
        layout = replace(self.layout, ft_rank=L.shape[1])
        self.restore(StoredFactors(layout, {**self.factors().tensors, "ft_L": _frozen(L), "ft_R": _frozen(R)}))

    def replace_factors(self, L: Tensor, R: Tensor) -> None:
        """Make the product L R, rounded to float16, the low-rank part.

        Args:
            L, R: [out, k] and [k, in] float, in the rotated basis.

        Raises:
            FloatingPointError: if they are not finite in float16; the layer is then unchanged.
        """
        L, R = in_float16(L, R)
        layout = replace(self.layout, rank=L.shape[1], factor_bits=16, ft_rank=0)
        stored = {"lr_L": _frozen(L), "lr_R": _frozen(R)} if L.shape[1] else {}
        self.restore(StoredFactors(layout, {**dict.fromkeys(FACTOR_NAMES), **stored}))

    def rotated(self, L: Tensor, R: Tensor) -> Pair:
        """Factors of a product for unrotated inputs and outputs, as factors in the basis of L and R of this layer.

        Raises:
            ValueError: if the rotations are not signs any more; the way back would need their inverse.
        """
        if self.rot_in is None or self.rot_out is None:
            return L, R
        if not all((signs.abs() == 1).all() for signs in (self.rot_in, self.rot_out)):
            raise ValueError("rot_in and rot_out are no longer signs (they were trained): nothing can be moved behind.")
        block = self.layout.rotation_block
        return hadamard(L.T * self.rot_out.to(L), block).T, hadamard(R * self.rot_in.to(R), block)

    def unrotated(self, L: Tensor, R: Tensor) -> Pair:
        """Inverse of `rotated`; for any rotations."""
        if self.rot_in is None or self.rot_out is None:
            return L, R
        block = self.layout.rotation_block
        return (hadamard(L.T, block) * self.rot_out.to(L)).T, hadamard(R, block) * self.rot_in.to(R)

    def factor_gram(self, H: Tensor, adapter: str = "") -> Tensor:
        """The Gram [in, in] of what R is multiplied with, from that of the layer's inputs."""
        if self.rot_in is None:
            return H
        signs, block = self.rot_in.detach().to(H), self.layout.rotation_block
        return hadamard(hadamard(H * signs, block).T * signs, block)

    def reset_parameters(self) -> None:
        """Nothing: codes are loaded, never initialised."""

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        layout = self.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"codebook={layout.codebook}, rank={self.rank}, factor_bits={layout.factor_bits}"
            + (f", ft_rank={self.ft_rank}" if self.ft_rank else "")
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
