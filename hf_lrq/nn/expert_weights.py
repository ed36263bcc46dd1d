"""What stands where a module's own code looks for a stack of expert matrices: products with it come from a function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lrq.errors import CompressionError

_REMEDY = "Leave these experts out with modules_to_not_convert."
Product = Callable[[Tensor, int], Tensor]  # [tokens, in], expert -> [tokens, out].


class ExpertWeights:
    """Takes the place of a parameter [E, out, in], or [E, in, out] if transposed, of which only products are asked.

    Those are F.linear(x, W[e]), x @ W[e] of a transposed one, and torch.bmm(x, W) of all of a transposed one. Anything
    else is an error.

    Args:
        product: computes x W_e^T.
        shape: of the parameter.
        transposed: whether the matrices are stored as [in, out].
        device: of the parameter.
        expert: which matrix it is; None for the whole stack.

    >>> W = torch.tensor([[[1.0, 2.0]]])
    >>> stand_in = ExpertWeights(lambda x, expert: x @ W[expert].T, W.shape, False, W.device)
    >>> torch.nn.functional.linear(torch.tensor([[3.0, 4.0]]), stand_in[0])
    tensor([[11.]])
    """

    def __init__(
        self,
        product: Product,
        shape: Sequence[int],
        transposed: bool,
        device: torch.device,
        expert: int | None = None,
    ):
        self._product, self._transposed, self._expert = product, transposed, expert
        self.shape, self.device = torch.Size(shape), device

    def __getitem__(self, expert: int | Tensor) -> "ExpertWeights":
        """The matrix of one expert."""
        if self._expert is not None:
            raise CompressionError("a part of the matrix of an expert was asked for, which is compressed. " + _REMEDY)
        return ExpertWeights(self._product, self.shape[1:], self._transposed, self.device, int(expert))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        name = getattr(function, "__name__", str(function))
        match args:
            case (Tensor() as x, ExpertWeights() as W, *bias) if W.takes(name):
                y = W.times_all(x) if W._expert is None else W._product(x, W._expert)
                bias = [*bias, *(kwargs or {}).values()]
                return y if not bias or bias[0] is None else y + bias[0]
        # Not a TypeError, which operators hide.
        raise CompressionError(f"{name} is no product with the matrix of an expert, which is compressed. {_REMEDY}")

    def takes(self, name: str) -> bool:
        """Whether a function of torch of this name, with x before this, is a product x W^T."""
        if self._expert is None:
            return self._transposed and name == "bmm"
        return name == "linear" if not self._transposed else name in ("matmul", "__matmul__", "mm")

    def times_all(self, x: Tensor) -> Tensor:
        """[E, tokens, in] -> [E, tokens, out], each expert on its own; rows of zeros cost nothing."""
        products = []
        for expert, rows in enumerate(x):
            # A gradient flows back to inputs that are zero, too.
            used = slice(None) if rows.requires_grad and torch.is_grad_enabled() else rows.any(-1)
            out = rows.new_zeros(len(rows), self.shape[-1])
            out[used] = self._product(rows[used], expert)
            products.append(out)
        return torch.stack(products)
