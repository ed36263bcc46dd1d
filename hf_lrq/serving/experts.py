"""Compressed experts, as an engine calls them."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lrq.kernels import linear_experts
from hf_lrq.nn.routing import routed
from hf_lrq.serving.options import AUTOMATIC, Way
from hf_lrq.serving.parts import Part


def routed_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: list[Part],
    down: Part,
    act: Callable[[Tensor], Tensor],
    way: Way = AUTOMATIC,
) -> Tensor:
    """The sum over each token's experts of weight * down(act(up x)).

    Args:
        x: [tokens, hidden].
        chosen: [tokens, k] experts, integers; those outside of 0 to E - 1 stand for none.
        weights: [tokens, k].
        up: stacks whose outputs stand side by side: of gate and up as one, or of each.
        down: the stack of the way back.
        act: what comes between, such as silu(gate) * up; of zeros it makes zeros.
        way: backend and activation, see `kernels.linear`.

    Returns:
        [tokens, hidden] in the dtype of x; summed in float32.
    """

    def through(rows: Tensor, counts: Tensor) -> Tensor:
        between = act(torch.cat(linear_experts(rows, counts, [part.operands() for part in up], *way), -1))
        return linear_experts(between, counts, [down.operands()], *way)[0]

    return routed(x, chosen, weights, down.experts or 0, through)
