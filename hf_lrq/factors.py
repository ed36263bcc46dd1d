"""Pairs of float factors: read from what is stored, joined, multiplied out where ranks are many, rounded to float16."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_lrq.matrices import Pair, dense_factor


def stored_pairs(tensors: Mapping[str, Tensor | None]) -> list[Pair]:
    """The float factors of a layer, in the order of their ranks.

    Args:
        tensors: name -> stored tensor, see `layout.LayerLayout.tensors`; what is None or missing is not there.
    """
    pairs = []
    L, R = tensors.get("lr_L"), tensors.get("lr_R")
    if L is not None and R is not None:
        pairs.append((dense_factor(L, tensors.get("lr_L_scale"), 1), dense_factor(R, tensors.get("lr_R_scale"), 0)))
    L, R = tensors.get("ft_L"), tensors.get("ft_R")
    if L is not None and R is not None:
        pairs.append((L, R))
    return pairs


def dense_pair(tensors: Mapping[str, Tensor | None], out_features: int, in_features: int, like: Tensor) -> Pair:
    """`stored_pairs` as one pair; without any, one of rank 0 in the dtype and on the device of `like`."""
    pairs = stored_pairs(tensors)
    return concatenated(pairs) if pairs else (like.new_empty(out_features, 0), like.new_empty(0, in_features))


def concatenated(pairs: Sequence[Pair]) -> Pair:
    """One pair whose product is the sum of the products."""
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([L for L, _ in pairs], 1), torch.cat([R for _, R in pairs], 0)


def least_ranks(L: Tensor, R: Tensor) -> Pair:
    """The same product in at most min(out, in) ranks: multiplied out where there are more."""
    out_features, in_features = L.shape[0], R.shape[1]
    if L.shape[1] <= min(out_features, in_features):
        return L, R
    product = L @ R
    if out_features <= in_features:
        return torch.eye(out_features, dtype=L.dtype, device=L.device), product
    return product, torch.eye(in_features, dtype=R.dtype, device=R.device)


@torch.no_grad()
def in_float16(L: Tensor, R: Tensor) -> Pair:
    """Contiguous float16 factors of the product L R, in at most min(out, in) ranks.

    What is small in one factor and large in the other would lose digits, so each rank is balanced; by a power of two,
    which changes no digit.

    Raises:
        FloatingPointError: if they are not finite in float16.
    """
    L, R = least_ranks(L.float(), R.float())
    left, right = L.square().mean(0).sqrt(), R.square().mean(1).sqrt()
    usable = (left > 0) & (right > 0)
    exponent = torch.where(usable, (right / left).log2() / 2, torch.zeros_like(left)).round().int()
    L, R = torch.ldexp(L, exponent).half(), torch.ldexp(R, -exponent.unsqueeze(1)).half()
    if not (torch.isfinite(L).all() and torch.isfinite(R).all()):
        raise FloatingPointError("the factors hold NaN, Inf, or values beyond the range of float16 (65504).")
    return L.contiguous(), R.contiguous()
