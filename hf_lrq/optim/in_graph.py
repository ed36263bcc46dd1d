"""Preconditioning inside the graph: the forward pass is the identity, the backward pass divides by the other Gram.

What reaches `.grad` is preconditioned already, so any optimizer can follow (8-bit, fused, DeepSpeed's) and any wrapper
can average: the preconditioner is linear, and constant between two steps. Clipping and logged gradient norms see the
preconditioned gradient too. It costs one r x r factorization per factor and backward pass, where the optimizers of this
package need one batched factorization per step.

`precondition_in_graph` is for a module that knows of it. `precondition_gradients` is for whole models whose modules do
not: while a module that holds pairs runs, hooks replace its factors by views with preconditioned gradients behind them.
Names, shapes and saving stay as they are. The hooks run after those of FSDP2 and ZeRO-3 that gather parameters.
torch.compile is not supported: it does not see what hooks exchange.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.hooks import RemovableHandle

from hf_lrq.optim.param_groups import FACTOR_ATTRIBUTES, by_adapter, entries, factors_of, is_matrix_product
from hf_lrq.optim.precondition import DAMPING, check_damping, whitening_for_L, whitening_for_R

Holder = tuple[nn.Module, str]  # A module, and the name of one of its own parameters.
Views = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]  # L, R and scaling -> the same with other gradients.


class PreconditionedFactor(torch.autograd.Function):
    """`apply(factor, other, left, damping, scaling)` gives the factor; the gradient is divided by the other's Gram."""

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


@dataclass(eq=False)
class InGraph:
    """Changed gradients that are switched on.

    Attributes:
        names: names of the modules that hold pairs.
    """

    names: list[str] = field(default_factory=list)
    _handles: list[RemovableHandle] = field(default_factory=list)

    def remove(self) -> None:
        """Switch it off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def precondition_gradients(
    model: nn.Module, damping: float = DAMPING, attributes: Iterable[tuple[str, str]] = FACTOR_ATTRIBUTES
) -> InGraph:
    """Make every pair of trainable factors receive preconditioned gradients, for any optimizer and any wrapper.

    Call it after the adapters are made and before the model is wrapped. Found are the pairs that `factor_pairs` finds,
    with their scaling at the time of each call. Do not combine it with `RiemannianAdamW` or `RiemannianSGD`, unless
    with precond="none": they would precondition again.

    Args:
        model: any module.
        damping: positive; a fraction of the mean eigenvalue of each Gram.
        attributes: names under which modules hold L and R.

    Returns:
        What switches it off again.

    Raises:
        ValueError: if the damping is not positive, or there is no pair.
    """
    check_damping(damping)

    def views(L: Tensor, R: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        return precondition_in_graph(L, R, damping, scaling)

    return switched_on(model, views, attributes)


def switched_on(model: nn.Module, views: Views, attributes: Iterable[tuple[str, str]] = FACTOR_ATTRIBUTES) -> InGraph:
    """Make every pair of trainable factors of a model receive the gradients behind its views.

    Raises:
        ValueError: if there is no pair.
    """
    attributes = tuple(attributes)
    switched = InGraph()
    for name, module in model.named_modules():
        if not any(True for left, right in attributes for _ in trained_pairs(module, left, right)):
            continue
        swap = Swap(module, views, attributes)
        switched.names.append(name)
        switched._handles.append(module.register_forward_pre_hook(swap.enter))
        switched._handles.append(module.register_forward_hook(swap.leave, always_call=True))
    if not switched.names:
        raise ValueError(f"{type(model).__name__} has no trainable floating-point factors.")
    return switched


def trained_pairs(module: nn.Module, left: str, right: str) -> Iterable[tuple[str, Tensor, Tensor]]:
    """(adapter, L, R) of each pair that is trained."""
    for adapter, L, R in factors_of(module, left, right):
        if is_matrix_product(module, adapter, L, R) and (L.requires_grad or R.requires_grad):
            yield adapter, L, R


@dataclass(eq=False)
class Swap:
    """The hooks of one module."""

    module: nn.Module
    views: Views
    attributes: tuple[tuple[str, str], ...]
    _places: list[Holder] = field(default_factory=list)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Put views before the factors."""
        for left, right in self.attributes:
            for adapter, L, R in list(trained_pairs(module, left, right)):
                scaling = float(by_adapter(module, "scaling", adapter, 1.0))
                for attribute, view in zip((left, right), self.views(L, R, scaling), strict=True):
                    holder, name = holder_of(module, attribute, adapter)
                    # Attributes are looked up here first; the parameter stays registered, in its place.
                    holder.__dict__[name] = view
                    self._places.append((holder, name))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Take them away, also after an error."""
        while self._places:
            holder, name = self._places.pop()
            del holder.__dict__[name]


def holder_of(module: nn.Module, attribute: str, adapter: str) -> Holder:
    """Where a factor is registered: in the module itself, in a ParameterDict, or as the weight of a module in one."""
    held = getattr(module, attribute)
    if isinstance(held, nn.Parameter):
        return module, attribute
    if isinstance(held, nn.ParameterDict):
        return held, adapter
    inner = held[adapter] if isinstance(held, nn.ModuleDict) else held
    assert entries(inner), "trained_pairs found a tensor here"
    return inner, "weight"
