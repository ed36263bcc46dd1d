"""The compressed linear layer: y = rot_out * H_out(Q z + L (R z)) + bias, z = H_in(rot_in * x)."""

import torch
from torch import Tensor, nn

from hf_lrq.decomposition.compress_matrix import CompressedMatrix
from hf_lrq.kernels import hadamard, linear
from hf_lrq.layout import LayerLayout
from hf_lrq.matrices import QuantizedMatrix, dense_factor

TENSOR_NAMES = ("weight", "scales", "rot_in", "rot_out", "lr_L", "lr_R", "lr_L_scale", "lr_R_scale")


class LRQLinear(nn.Linear):
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
        weight: uint8 [out, tiles, bits]; three axes, so that it can never pass for an [out, in] weight.
        scales, rot_in, rot_out, lr_L, lr_R, lr_L_scale, lr_R_scale: see `layout.LayerLayout.tensors`; None where the
            layout has no such tensor.
    """

    scales: nn.Parameter
    rot_in: nn.Parameter | None
    rot_out: nn.Parameter | None
    lr_L: nn.Parameter | None
    lr_R: nn.Parameter | None
    lr_L_scale: nn.Parameter | None
    lr_R_scale: nn.Parameter | None

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
            ValueError: if the shapes differ.
        """
        for name, tensor in matrix.tensors().items():
            own = getattr(self, name)
            if own is None or own.shape != tensor.shape:
                expected = None if own is None else tuple(own.shape)
                raise ValueError(f"{name} of the matrix has shape {tuple(tensor.shape)}, the layer holds {expected}.")
            own.data.copy_(tensor)

    @property
    def rank(self) -> int:
        """Ranks of L R."""
        if self.lr_L is None:
            return 0
        return len(self.lr_L_scale) if self.lr_L_scale is not None else self.lr_L.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of x.

        Raises:
            ValueError: if x has the wrong width or is not floating point.
        """
        if x.shape[-1] != self.in_features or not x.is_floating_point():
            raise ValueError(
                f"LRQLinear({self.in_features}, {self.out_features}) takes floating-point inputs of width "
                f"{self.in_features}, got {x.dtype} of shape {tuple(x.shape)}."
            )
        return linear(
            x,
            self.weight,
            self.scales,
            self.rot_in,
            self.rot_out,
            self.lr_L,
            self.lr_R,
            self.lr_L_scale,
            self.lr_R_scale,
            self.bias,
            self.layout.codebook,
            self.layout.group_size,
            self.layout.rotation_block,
        )

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight this layer applies, [out, in]; computed in float32."""
        W = QuantizedMatrix(
            self.weight, self.scales, self.layout.codebook, self.in_features, self.layout.group_size
        ).dequantize()
        if self.lr_L is not None and self.lr_R is not None:
            W = (
                W
                + dense_factor(self.lr_L, self.lr_L_scale, 1).float()
                @ dense_factor(self.lr_R, self.lr_R_scale, 0).float()
            )
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

    def reset_parameters(self) -> None:
        """Nothing: codes are loaded, never initialised."""

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        layout = self.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"codebook={layout.codebook}, rank={self.rank}, factor_bits={layout.factor_bits}"
        )
