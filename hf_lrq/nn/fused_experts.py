"""Fused mixture-of-experts layers of transformers, computed on compressed stacks.

Those that are called with the experts of each token and have a gate of their own (`_apply_gate`) are computed here. All
others run their own code, with an `ExpertWeights` in the place of each stack.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.nn.classes import become
from hf_lrq.nn.expert_weights import ExpertWeights, Product
from hf_lrq.nn.experts import LRQExpertStack
from hf_lrq.nn.routing import routed

PREFIX = "qstack_"  # Not "<matrix>_...": the name patterns of some transformers releases have no end.
GATED = ("gate_up_proj", "down_proj")
# Parameters [E, out, in], or [E, in, out] if transposed, that make a module one of fused experts; in order of use.
_STACKS = (GATED, ("up_proj", "down_proj"), ("weight",))
_PRODUCTS = "_hf_lrq_products"


class CompressedExperts:
    """Mixed into the class of a fused experts module whose stacks are compressed."""


class GatedExperts(CompressedExperts):
    """Experts down(act(gate) * up), with biases where there are some."""

    num_experts: int
    qstack_gate_up_proj: LRQExpertStack
    qstack_down_proj: LRQExpertStack

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over each token's experts of weight * down(act(gate) * up).

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k] experts; `num_experts` stands for none.
            top_k_weights: [tokens, k].
        """

        def through(rows: Tensor, counts: Tensor) -> Tensor:
            gate_up = self.qstack_gate_up_proj(rows, counts, _biases(self, "gate_up_proj"))
            gated = self._apply_gate(gate_up)  # type: ignore[attr-defined]
            return self.qstack_down_proj(gated, counts, _biases(self, "down_proj"))

        return routed(hidden_states, top_k_index, top_k_weights, self.num_experts, through)


class OwnCodeExperts(CompressedExperts):
    """Experts whose own code runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original class computes, by its plainest way."""
        return _own_forward(type(self).__bases__[1])(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Called for parameters that are gone."""
        if (given := vars(self).get(_PRODUCTS, {}).get(name)) is not None:
            return given
        stack = vars(self).get("_modules", {}).get(PREFIX + name)
        if not isinstance(stack, LRQExpertStack):
            return super().__getattr__(name)  # type: ignore[misc]
        return ExpertWeights(stack, stack.uncompressed_shape, stack.transposed, stack.weight.device)


def plus_bias(module: Any, stack: str, expert: int, y: Tensor) -> Tensor:
    """Products with the matrix of an expert, and its bias where the module has some."""
    biases = _biases(module, stack)
    return y if biases is None else y + biases[expert]


def _biases(module: Any, stack: str) -> Tensor | None:
    """[E, out], or None where the module has none."""
    biases: Tensor | None = module._parameters.get(f"{stack}_bias")
    return biases


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the stacks of a fused experts module, compressed or not; none for other modules."""
    held = {name for name, one in module._parameters.items() if one is not None and one.ndim == 3}
    held |= {name.removeprefix(PREFIX) for name, one in module._modules.items() if isinstance(one, LRQExpertStack)}
    return next((names for names in _STACKS if set(names) == held and _is_stack(module, names)), ())


def _is_stack(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module with such parameters is known by more than their names."""
    if len(names) > 1 or PREFIX + names[0] in module._modules:
        return True
    expected = tuple(getattr(module, name, None) for name in ("num_experts", "output_size", "input_size"))
    return tuple(module.get_parameter(names[0]).shape) == expected


def has_fused_experts(module: nn.Module) -> bool:
    """Whether the module owns stacks of expert matrices as parameters."""
    names = stack_names(module)
    return bool(names) and all(module._parameters.get(name) is not None for name in names)


def is_transposed(module: nn.Module) -> bool:
    """Whether the stacks of an uncompressed fused experts module are [E, in, out]."""
    if (declared := getattr(module, "is_transposed", None)) is not None:
        return bool(declared)
    if stack_names(module) != GATED:
        return False
    gate_up, down = (module.get_parameter(name).shape for name in GATED)
    return gate_up[1] == down[2] and gate_up[2] != down[1]


def is_gated(module: nn.Module) -> bool:
    """Whether a fused experts module computes what `GatedExperts` computes."""
    gate = getattr(type(module), "_apply_gate", None)
    known = getattr(module, "is_concatenated", True) or getattr(gate, "__name__", "") == "_apply_gate"
    plain = getattr(module, "has_gate", True) and not getattr(module, "has_post_expert_norm", False)
    return stack_names(module) == GATED and gate is not None and bool(known and plain)


def obstacle(module: nn.Module) -> str | None:
    """What keeps a fused experts module from being computed on compressed stacks, None if nothing does."""
    if is_gated(module) or _runs_on_products(module):
        return None
    return f"{type(module).__name__} uses its experts in other ways than products with their matrices"


def with_products(module: nn.Module, products: Mapping[str, Product]) -> Any:
    """A copy of an uncompressed fused experts module, all else shared, whose own code takes products from functions."""
    transposed = is_transposed(module)
    weights = {name: module.get_parameter(name) for name in products}
    kind: Any = type(module)
    clone: Any = object.__new__(_compressed_class(kind, OwnCodeExperts))
    clone.__dict__ = {
        **{name: value for name, value in vars(module).items() if name not in ("forward", "_old_forward")},
        "_parameters": {name: one for name, one in module._parameters.items() if name not in products},
        _PRODUCTS: {name: ExpertWeights(products[name], W.shape, transposed, W.device) for name, W in weights.items()},
    }
    return clone


def _runs_on_products(module: nn.Module) -> bool:
    """Whether a fused experts module's own code asks for products of all stacks alone; tried out on zeros."""
    names, transposed = stack_names(module), is_transposed(module)
    used = set()

    def zeros(name: str) -> Product:
        out_features = module.get_parameter(name).shape[2 if transposed else 1]

        def product(x: Tensor, expert: int) -> Tensor:
            used.add(name)
            return x.new_zeros(len(x), out_features)

        return product

    first = module.get_parameter(names[0])
    experts, in_features = first.shape[0], first.shape[1 if transposed else 2]
    try:
        with torch.no_grad(), torch.device("cpu"):
            clone = with_products(module, {name: zeros(name) for name in names})
            # Norms and the like, whatever their values: the module's own may be on another device.
            clone._modules = {
                name: copy.deepcopy(child).to_empty(device="cpu") for name, child in clone._modules.items()
            }
            clone.forward(*_some_tokens(type(module), experts, in_features))
    # Whatever its code raises: it wants more than products.
    except Exception:
        return False
    return used == set(names)


def _some_tokens(kind: type[nn.Module], experts: int, in_features: int) -> tuple[Any, ...]:
    """Arguments for the forward of a fused experts class: a token for each expert that is called for."""
    x = torch.ones(experts, in_features)
    match takes(kind):
        case 1:
            return (x,)
        case 2:
            return x, [1] * experts
        case _:
            # One token for two experts is enough, and each expert takes its time.
            return x[:1], torch.tensor([[0, 1 % experts]]), torch.ones(1, 2)


def takes(kind: type[nn.Module]) -> int:
    """How many arguments say where the tokens of a fused experts class go, those themselves included.

    One: all experts get equally many tokens, one after the other. Two: the second says how many each gets. Three: the
    experts [tokens, k] of each token, and their weights.
    """
    return len(inspect.signature(_own_forward(kind)).parameters) - 1


def in_order(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call of a fused experts module, all by position."""
    return inspect.signature(_own_forward(type(module))).bind(module, *args, **kwargs).args[1:]


def _own_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    # transformers wraps the plain code into one that chooses among faster ones, which all read the weights.
    return inspect.unwrap(kind.forward)


def add_stack(module: nn.Module, matrix: str, stack: LRQExpertStack) -> None:
    """Give a fused experts module one of its compressed stacks; with the last it starts to compute with them."""
    names = stack_names(module)
    module.add_module(PREFIX + matrix, stack)
    if all(PREFIX + each in module._modules for each in names):
        use_stacks(module)


def use_stacks(module: nn.Module) -> None:
    """Swap the class of an experts module that owns compressed stacks for one that computes with them."""
    original: Any = type(module)
    if issubclass(original, CompressedExperts):
        return
    mixin = GatedExperts if is_gated(module) else OwnCodeExperts
    become(module, _compressed_class(original, mixin))
    module._is_hf_initialized = True  # type: ignore[assignment]  # `_init_weights` of these models reaches for the parameters that are gone.


@functools.cache
def _compressed_class(original: type[nn.Module], mixin: type[CompressedExperts]) -> type[nn.Module]:
    return type(f"LRQ{original.__name__}", (mixin, original), {"__module__": __name__})


def owns_stacks(module: nn.Module) -> bool:
    """Whether this is a fused experts module with compressed stacks."""
    return any(name.startswith(PREFIX) and isinstance(child, LRQExpertStack) for name, child in module._modules.items())


def remove_stack(module: nn.Module, matrix: str, parameter: Tensor) -> None:
    """Undo `add_stack`: the uncompressed parameter, and the original class."""
    if isinstance(module, CompressedExperts):
        become(module, type(module).__bases__[1])
    del module._modules[PREFIX + matrix]
    module._parameters.pop(matrix, None)
    module.register_parameter(matrix, nn.Parameter(parameter))
