"""Tokens through the experts that a router chose for them, with compressed matrices."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lrq.kernels import linear, linear_group
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

    Tokens are sorted by their experts once; each expert that has some gets them as one piece, without another look at
    who chose it.

    Args:
        x: [tokens, hidden].
        chosen: [tokens, k] experts, integers; those outside of 0 to E - 1 stand for none.
        weights: [tokens, k].
        up: stacks whose outputs stand side by side: of gate and up as one, or of each.
        down: the stack of the way back.
        act: what comes between, such as silu(gate) * up.
        way: backend and activation, see `kernels.linear`.

    Returns:
        [tokens, hidden] in the dtype of x; summed in float32.
    """
    experts = down.experts or 0
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts).tolist()
    tokens = order // chosen.shape[1]
    start = int((flat < 0).sum())
    out = x.new_zeros(x.shape, dtype=torch.float32)
    for expert, count in enumerate(counts):
        if not count:
            continue
        own = slice(start, start + count)
        start += count
        inputs = x[tokens[own]]
        between = act(torch.cat(linear_group(inputs, [part.operands(expert) for part in up], *way), -1))
        y = linear(between, down.operands(expert), *way)
        out.index_add_(0, tokens[own], y.float() * weights.flatten()[order[own], None])
    return out.to(x.dtype)
