"""Fused mixture-of-experts layers of transformers, computed on compressed stacks."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.calibration.targets import EXPERT_MATRICES
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQExpertStack

PREFIX = "qstack_"  # Not "<matrix>_...": the name patterns of some transformers releases have no end.


class CompressedExperts:
    """Mixed into the class of a fused experts module whose stacks are compressed."""

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
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:
                continue
            token, position = torch.where(top_k_index == expert)
            gate_up = self.qstack_gate_up_proj(hidden_states[token], expert)
            result = self.qstack_down_proj(self._apply_gate(gate_up), expert)  # type: ignore[attr-defined]
            out.index_add_(0, token, (result * top_k_weights[token, position, None]).to(out.dtype))
        return out


def add_stacks(module: nn.Module, layouts: Mapping[str, LayerLayout], keep_weights: bool) -> None:
    """Give a fused experts module empty compressed stacks on the device of its weights, and the forward that uses them.

    Args:
        module: with `gate_up_proj` and `down_proj` [E, out, in].
        layouts: of each of the two.
        keep_weights: leave the uncompressed parameters in place, to be loaded and compressed.
    """
    for matrix in EXPERT_MATRICES:
        weight = getattr(module, matrix)
        experts, rows, columns = weight.shape
        stack = LRQExpertStack(experts, columns, rows, layouts[matrix], device=weight.device)
        module.add_module(PREFIX + matrix, stack)
        if not keep_weights:
            delattr(module, matrix)
    use_stacks(module)


def use_stacks(module: nn.Module) -> None:
    """Swap the class of an experts module that owns compressed stacks for one that computes with them."""
    original = type(module)
    if issubclass(original, CompressedExperts):
        return
    module.__class__ = _compressed_class(original)  # type: ignore[arg-type]
    module._is_hf_initialized = True  # type: ignore[assignment]  # `_init_weights` of these models reaches for the parameters that are gone.


@functools.cache
def _compressed_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"LRQ{original.__name__}", (CompressedExperts, original), {"__module__": __name__})


def owns_stacks(module: nn.Module) -> bool:
    """Whether this is a fused experts module with compressed stacks."""
    return any(isinstance(module._modules.get(PREFIX + matrix), LRQExpertStack) for matrix in EXPERT_MATRICES)


def remove_stacks(module: nn.Module, dtype: torch.dtype) -> None:
    """Undo `add_stacks`: uncompressed parameters in `dtype`, and the original class."""
    for matrix in EXPERT_MATRICES:
        stack: Any = module._modules.pop(PREFIX + matrix)
        module.register_parameter(matrix, nn.Parameter(stack.dense(dtype)))
    module.__class__ = type(module).__mro__[2]
