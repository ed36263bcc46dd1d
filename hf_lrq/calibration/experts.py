"""The inputs of each matrix of fused experts, from one call of their module."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lrq.calibration.masks import Masks
from hf_lrq.nn.expert_weights import Product
from hf_lrq.nn.fused_experts import is_gated, is_transposed, plus_bias, stack_names, takes, with_products


def expert_inputs(module: nn.Module, name: str, call: tuple[Any, ...], masks: Masks) -> dict[str, Tensor]:
    """The tokens [tokens, in] that each matrix got, by its name "<module>.<stack>.<expert>".

    Masked ones are left out where they can be told.

    Args:
        module: uncompressed.
        name: of the module.
        call: its arguments, in order.
        masks: of the batch.
    """
    call = _of_real_tokens(module, name, call, masks)
    inputs = _gated_inputs(module, *call) if is_gated(module) else _inputs_of_own_code(module, call)
    rows: dict[str, list[Tensor]] = {}
    for stack, expert, x in inputs:
        rows.setdefault(f"{name}.{stack}.{expert}", []).append(x)
    return {key: torch.cat(parts) for key, parts in rows.items()}


def _of_real_tokens(module: nn.Module, name: str, call: tuple[Any, ...], masks: Masks) -> tuple[Any, ...]:
    """The same call without masked tokens; see `fused_experts.takes` for the three ways to call."""
    x = call[0].reshape(-1, call[0].shape[-1])
    match takes(type(module)):
        case 1:
            experts = module.get_parameter(stack_names(module)[0]).shape[0]
            tokens = len(x) // experts
            kept = x.new_zeros(tokens, 1)
            kept[masks.real(name, tokens, x.device)] = 1
            return ((x.reshape(experts, tokens, -1) * kept).reshape(x.shape),)  # Rows of zeros go to no expert.
        case 2:
            return (x, *call[1:])  # In an order that has nothing to do with positions.
        case _:
            real = masks.real(name, len(x), x.device)
            return (x[real], *(one.reshape(len(x), -1)[real] for one in call[1:3]), *call[3:])


def _gated_inputs(module: Any, x: Tensor, chosen: Tensor, *_: Any) -> Iterator[tuple[str, int, Tensor]]:
    """Stack, expert and inputs of `GatedExperts`: the tokens routed to each expert, before and after its gate."""
    transposed = is_transposed(module)
    for expert, W in enumerate(module.gate_up_proj):
        inputs = x[(chosen == expert).any(-1)]
        if len(inputs):
            yield "gate_up_proj", expert, inputs
            gate_up = plus_bias(module, "gate_up_proj", expert, F.linear(inputs, W.T if transposed else W))
            yield "down_proj", expert, module._apply_gate(gate_up)


def _inputs_of_own_code(module: nn.Module, call: tuple[Any, ...]) -> Iterator[tuple[str, int, Tensor]]:
    """Stack, expert and inputs of the products that a module's own code asks for."""
    transposed = is_transposed(module)
    found: list[tuple[str, int, Tensor]] = []

    def noting(stack: str) -> Product:
        weights = module.get_parameter(stack)

        def product(x: Tensor, expert: int) -> Tensor:
            if len(x):
                found.append((stack, expert, x))
            return F.linear(x, weights[expert].T if transposed else weights[expert])

        return product

    with_products(module, {stack: noting(stack) for stack in stack_names(module)}).forward(*call)
    yield from found
