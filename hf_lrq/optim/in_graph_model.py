"""Preconditioning inside the graph of a whole model, by hooks: its modules need not know.

While a module that holds pairs runs, its factors are replaced by views with preconditioned gradients behind them, see
`in_graph`. Names, shapes and saving stay as they are. The hooks run after those of FSDP2 and ZeRO-3 that gather
parameters. torch.compile is not supported: it does not see what hooks exchange.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_lrq.optim.in_graph import precondition_in_graph
from hf_lrq.optim.pairs import FACTOR_ATTRIBUTES, by_adapter, entries, factors_of, is_matrix_product
from hf_lrq.optim.precondition import DAMPING, check_damping

Holder = tuple[nn.Module, str]  # A module, and the name of one of its own parameters.


@dataclass(eq=False)
class InGraph:
    """Preconditioning that is switched on.

    Attributes:
        names: of the modules that hold pairs.
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
    attributes = tuple(attributes)
    switched = InGraph()
    for name, module in model.named_modules():
        if not any(True for left, right in attributes for _ in trained_pairs(module, left, right)):
            continue
        swap = Swap(module, damping, attributes)
        switched.names.append(name)
        switched._handles.append(module.register_forward_pre_hook(swap.enter))
        switched._handles.append(module.register_forward_hook(swap.leave, always_call=True))
    if not switched.names:
        raise ValueError(f"{type(model).__name__} has no trainable floating-point factors to precondition.")
    return switched


def trained_pairs(module: nn.Module, left: str, right: str) -> Iterable[tuple[str, Tensor, Tensor]]:
    """(adapter, L, R) of the pairs that are trained."""
    for adapter, L, R in factors_of(module, left, right):
        if is_matrix_product(module, adapter, L, R) and (L.requires_grad or R.requires_grad):
            yield adapter, L, R


@dataclass(eq=False)
class Swap:
    """The hooks of one module."""

    module: nn.Module
    damping: float
    attributes: tuple[tuple[str, str], ...]
    _places: list[Holder] = field(default_factory=list)

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Put preconditioned views before the factors."""
        for left, right in self.attributes:
            for adapter, L, R in list(trained_pairs(module, left, right)):
                scaling = float(by_adapter(module, "scaling", adapter, 1.0))
                views = precondition_in_graph(L, R, self.damping, scaling)
                for attribute, view in zip((left, right), views, strict=True):
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
