"""Tokens through the experts that a router chose for them, sorted by expert so that one call computes all."""

from collections.abc import Callable

import torch
from torch import Tensor


def routed(
    x: Tensor, chosen: Tensor, weights: Tensor, experts: int, through: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The sum over each token's experts of weight * expert(x).

    No size depends on what was chosen, so that one graph can be compiled for all choices.

    Args:
        x: [tokens, hidden].
        chosen: [tokens, k] experts, integers; those outside of 0 to `experts` - 1 stand for none.
        weights: [tokens, k].
        experts: how many there are.
        through: rows [tokens * k, hidden] sorted by expert, and how many each has [experts] -> [tokens * k, out], zeros
            where the expert is none.

    Returns:
        [tokens, out] in the dtype of x; summed in float32.
    """
    flat = chosen.flatten().long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)  # None come last.
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(experts + 1).scatter_add_(0, flat, torch.ones_like(flat))[:experts]
    rows = through(x[order // chosen.shape[1]], counts)
    y = rows[order.argsort()].unflatten(0, chosen.shape)  # [tokens, k, out]
    return (y.float() * weights.float().unsqueeze(-1)).sum(1).to(x.dtype)
