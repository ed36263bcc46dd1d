"""A stack of compressed matrices of equal shape: the fused experts of a mixture-of-experts layer."""

import torch
from torch import Tensor, nn

from hf_lrq.decomposition.compress_matrix import CompressedMatrix
from hf_lrq.kernels import Operands, linear, linear_experts
from hf_lrq.layout import TENSOR_NAMES, LayerLayout
from hf_lrq.nn.linear import LRQLinear
from hf_lrq.nn.stored import HoldsFactors, check_same_layout


class LRQExpertStack(HoldsFactors):
    """E compressed [out, in] matrices; each stored tensor is that of one layer with a leading axis [E].

    Args:
        experts: E.
        in_features, out_features: of each matrix.
        layout: of each matrix.
        device: where to make the tensors.
        transposed: whether the uncompressed parameter is [E, in, out].

    Attributes:
        backend, activation: see `LRQLinear`.
    """

    backend = "auto"
    activation = "float"

    weight: nn.Parameter
    scales: nn.Parameter

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        layout: LayerLayout,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ):
        super().__init__()
        self.training = False
        self.transposed = transposed
        self.experts, self.in_features, self.out_features, self.layout = experts, in_features, out_features, layout
        stored = layout.tensors(out_features, in_features)
        for name in TENSOR_NAMES:
            tensor = stored.get(name)
            empty = None if tensor is None else torch.empty((experts, *tensor.shape), dtype=tensor.dtype, device=device)
            self.register_parameter(name, None if empty is None else nn.Parameter(empty, requires_grad=False))
        self._is_hf_initialized = True

    def load_matrix(self, expert: int, matrix: CompressedMatrix) -> None:
        """Take over the tensors of one expert, which must have the layout of the stack.

        Raises:
            ValueError: if the layouts differ; the stack is then unchanged.
        """
        check_same_layout(matrix, self.layout, self.stored_tensors(expert))
        for name, tensor in matrix.tensors().items():
            getattr(self, name).data[expert].copy_(tensor)

    def forward(self, x: Tensor, expert: int | Tensor, biases: Tensor | None = None) -> Tensor:
        """[tokens, in] -> [tokens, out] through one expert, or through all.

        Args:
            x: [tokens, in]; for all experts, sorted by them.
            expert: which one, or how many tokens each has [E], see `kernels.linear_experts`.
            biases: [E, out] of all experts.
        """
        activation = "float" if self.training else self.activation
        if isinstance(expert, Tensor):
            tensors = {name: stack for name in TENSOR_NAMES if (stack := getattr(self, name)) is not None}
            stack = Operands.of_stack(tensors, self.layout)._replace(bias=biases)
            return linear_experts(x, expert, [stack], self.backend, activation)[0]
        return linear(x, Operands.of(self.stored_tensors(expert), self.layout), self.backend, activation)

    def stored_tensors(self, expert: int) -> dict[str, Tensor]:
        """Name -> tensor of the format, of one expert."""
        return {name: stack[expert] for name in TENSOR_NAMES if (stack := getattr(self, name)) is not None}

    def runs_on(self, dtype: torch.dtype = torch.float32) -> str:
        """See `LRQLinear.runs_on`; what holds for one expert holds for all."""
        layer = self.layer(0)
        layer.backend, layer.activation = self.backend, self.activation
        return layer.runs_on(dtype)

    def layer(self, expert: int) -> LRQLinear:
        """One expert as a layer of its own (a copy)."""
        single = LRQLinear(self.in_features, self.out_features, False, self.layout, device=self.weight.device)
        for name, tensor in self.stored_tensors(expert).items():
            getattr(single, name).data.copy_(tensor.detach())
        return single

    @property
    def uncompressed_shape(self) -> tuple[int, int, int]:
        """Of the parameter that this stands for."""
        rows, columns = self.out_features, self.in_features
        return (self.experts, *((columns, rows) if self.transposed else (rows, columns)))

    @torch.no_grad()
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [E, out, in]."""
        return torch.stack([self.layer(expert).dense(dtype) for expert in range(self.experts)])

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"codebook={self.layout.codebook}"
        )
