"""Preconditioning inside the graph: the forward pass is the identity, the backward pass divides by the other Gram.

What reaches `.grad` is preconditioned already, so any optimizer can follow (8-bit, fused, DeepSpeed's) and any wrapper
can average: the preconditioner is linear, and constant between two steps. Clipping and logged gradient norms see the
preconditioned gradient too. It costs one r x r factorization per factor and backward pass, where the optimizers of this
package need one batched factorization per step.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hf_lrq.optim.precondition import DAMPING, check_damping, whitening_for_L, whitening_for_R


class PreconditionedFactor(torch.autograd.Function):
    """`apply(factor, other, left, damping, scaling)`: the factor; its gradient times the other's inverse Gram."""

    @staticmethod
    def forward(ctx: FunctionCtx, factor: Tensor, other: Tensor, left: bool, damping: float, scaling: float) -> Tensor:
        """A view of `factor`."""
        ctx.save_for_backward(other)
        ctx.left, ctx.damping, ctx.scaling = left, damping, scaling  # type: ignore[attr-defined]
        return factor.view_as(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The preconditioned gradient, in the dtype of the incoming one."""
        (other,) = ctx.saved_tensors  # type: ignore[attr-defined]
        whitening_for = whitening_for_L if ctx.left else whitening_for_R  # type: ignore[attr-defined]
        whitening = whitening_for(other, ctx.damping, ctx.scaling)  # type: ignore[attr-defined]
        return whitening.precondition(grad.to(whitening.K.dtype)).to(grad.dtype), None, None, None, None


def precondition_in_graph(
    L: Tensor, R: Tensor, damping: float = DAMPING, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """L and R unchanged, with preconditioned gradients behind them; see `precondition` for the formulas.

    Use the returned tensors in the forward pass in place of the parameters:

        L, R = precondition_in_graph(self.lr_L, self.lr_R)
        y = y + (x @ R.T) @ L.T

    Args:
        L: [..., out, r].
        R: [..., r, in].
        damping: positive; a fraction of the mean eigenvalue of each Gram.
        scaling: s, where the forward pass applies s L R.

    Raises:
        ValueError: if the damping is not positive.
    """
    check_damping(damping)
    return (
        PreconditionedFactor.apply(L, R.detach(), True, damping, scaling),
        PreconditionedFactor.apply(R, L.detach(), False, damping, scaling),
    )
