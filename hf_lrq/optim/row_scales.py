"""Gradients of L that are larger where its rows are small (ALLoRA, 2024): rows at zero leave it fast.

Inside the graph, as in `in_graph`, so that any optimizer can follow.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_lrq.optim.in_graph import InGraph, switched_on


class RowScaledFactor(torch.autograd.Function):
    """`apply(L, eta)` gives L; row i of its gradient is divided by sqrt(|L_i| + 1 / eta^2)."""

    @staticmethod
    def forward(ctx: FunctionCtx, L: Tensor, eta: float) -> Tensor:
        """A view of L [..., out, r]."""
        ctx.save_for_backward(L)
        ctx.eta = eta  # type: ignore[attr-defined]
        return L.view_as(L)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The scaled gradient, in the dtype of the incoming one."""
        (L,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grad * row_scales(L, ctx.eta)).to(grad.dtype), None  # type: ignore[attr-defined]


def row_scales(L: Tensor, eta: float) -> Tensor:
    """1 / sqrt(|L_i| + 1 / eta^2) for each row, [..., out, 1], in float32 or more; eta where a row is zero.

    >>> row_scales(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), 2.0).flatten().tolist()  # The norm of the second is 5.
    [2.0, 0.4364357888698578]
    """
    exact = L if L.dtype == torch.float64 else L.float()
    return (exact.norm(dim=-1, keepdim=True) + 1 / eta**2).rsqrt()


def scale_gradients_by_rows(model: nn.Module, eta: float = 2.0) -> InGraph:
    """Scale the gradient of each row of L by 1 / sqrt(|L_i| + 1 / eta^2), for any optimizer and any wrapper (ALLoRA).

    Call it after the adapters are made and before the model is wrapped. Found are the pairs that `factor_pairs` finds:
    of `LRQAdapterConfig`, and of PEFT's LoRA, whose L is lora_B. The method has neither dropout nor scaling, so give
    LoraConfig lora_dropout=0 and lora_alpha=r. Optimizers that divide a gradient by its own size, such as Adam, see of
    the scales only how they change; they act in full in SGD.

    Args:
        model: any module.
        eta: above zero; how much larger the gradient of a row of zeros is.

    Returns:
        What switches it off again.

    Raises:
        ValueError: if eta is not positive, or there is no pair.
    """
    if not eta > 0:
        raise ValueError(f"eta must be positive, got {eta}. It is the scale of rows that are zero; 2 is usual.")

    def views(L: Tensor, R: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        return RowScaledFactor.apply(L, eta), R

    return switched_on(model, views)
