"""Fused mixture-of-experts layers of transformers, computed on compressed stacks."""

import functools

import torch
from torch import Tensor, nn

from hf_lrq.nn.experts import LRQExpertStack

EXPERT_MATRICES = ("gate_up_proj", "down_proj")
PREFIX = "qstack_"  # Not "<matrix>_...": the name patterns of some transformers releases have no end.
# Flags of fused expert layers whose storage or arithmetic differs from plain [E, out, in] gated experts without bias.
_UNSUPPORTED = {"has_bias": True, "is_transposed": True, "is_concatenated": False, "has_gate": False}


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


def has_fused_experts(module: nn.Module) -> bool:
    """Whether the module owns stacks of expert matrices [E, out, in] as parameters."""
    stacks = [module._parameters.get(matrix) for matrix in EXPERT_MATRICES]
    return all(stack is not None and stack.ndim == 3 for stack in stacks)


def unsupported_flag(module: nn.Module) -> str | None:
    """What keeps a fused experts module from being computed on compressed stacks, None if nothing does."""
    for flag, unsupported in _UNSUPPORTED.items():
        if getattr(module, flag, not unsupported) == unsupported:
            return f"{flag}={unsupported}"
    return None if hasattr(module, "_apply_gate") else "no _apply_gate"


def add_stack(module: nn.Module, matrix: str, stack: LRQExpertStack) -> None:
    """Give a fused experts module one of its compressed stacks; with the second it starts to compute with them."""
    module.add_module(PREFIX + matrix, stack)
    if all(PREFIX + each in module._modules for each in EXPERT_MATRICES):
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


def remove_stack(module: nn.Module, matrix: str, parameter: Tensor) -> None:
    """Undo `add_stack`: the uncompressed parameter, and the original class."""
    del module._modules[PREFIX + matrix]
    module._parameters.pop(matrix, None)
    module.register_parameter(matrix, nn.Parameter(parameter))
    if isinstance(module, CompressedExperts):
        module.__class__ = type(module).__mro__[2]
