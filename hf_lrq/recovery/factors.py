"""Factors of layers, and of stacks of experts, for training: floats while it lasts, then what they were before."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_lrq.layout import FACTOR_NAMES
from hf_lrq.matrices import Pair, dense_factor
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.nn.refit import coded
from hf_lrq.nn.stored import StoredFactors

Compressed = LRQLinear | LRQExpertStack
Tensors = Mapping[str, nn.Parameter | None]


def with_float_factors(layer: Compressed) -> None:
    """Give a layer parameters of its own for all factors; those of codes become float32."""
    stored = layer.factors()
    tensors = {
        name: None if p is None or not p.is_floating_point() else nn.Parameter(p.data.clone(), requires_grad=False)
        for name, p in stored.tensors.items()
    }
    layout = stored.layout
    if stored.are_codes:
        L, R = decoded(stored)
        tensors |= {"lr_L": nn.Parameter(L, requires_grad=False), "lr_L_scale": None}
        tensors |= {"lr_R": nn.Parameter(R, requires_grad=False), "lr_R_scale": None}
        layout = replace(layout, factor_bits=16)
    layer.restore(StoredFactors(layout, tensors))


def decoded(stored: StoredFactors) -> Pair:
    """L [..., out, r] and R [..., r, in] of codes, float32; in front is the axis of experts, where there is one."""
    return _decoded(stored, "lr_L", 1), _decoded(stored, "lr_R", 0)


def _decoded(stored: StoredFactors, name: str, rank_dim: int) -> Tensor:
    codes, scales = _present(stored, name), _present(stored, f"{name}_scale")
    if codes.ndim == 2:
        return dense_factor(codes, scales, rank_dim)
    return torch.stack([dense_factor(*one, rank_dim) for one in zip(codes, scales, strict=True)])


def store_factors(layer: Compressed, before: StoredFactors, generator: torch.Generator) -> None:
    """Round trained factors to float16; where they were codes, refit codes of as many ranks and bits to their product.

    A second pair beside codes stays one, in float16; that of a stack has been rounded already.
    """
    if isinstance(layer, LRQExpertStack):
        trained = layer.factors()
        second = {name: trained.tensors[name] for name in ("ft_L", "ft_R")}
        layer.restore(StoredFactors(before.layout, {**recoded(trained, before, generator), **second}))
        return
    if not before.are_codes:
        layer.replace_factors(*layer.low_rank())
        return
    pair = None if layer.ft_L is None or layer.ft_R is None else (layer.ft_L.float(), layer.ft_R.float())
    tensors = recoded(layer.factors(), before, generator)
    layer.restore(StoredFactors(replace(before.layout, ft_rank=0), tensors))
    if pair is not None:
        layer.absorb(*pair)


def recoded(trained: StoredFactors, before: StoredFactors, generator: torch.Generator) -> Tensors:
    """Codes of as many ranks and bits as before, fitted to the product of floats; matrix by matrix."""
    L, R = _present(trained, "lr_L"), _present(trained, "lr_R")
    rank, bits = _present(before, "lr_L_scale").shape[-1], before.layout.factor_bits
    if L.ndim == 2:
        return coded(L @ R, rank, bits, generator)
    each = [coded(left @ right, rank, bits, generator) for left, right in zip(L, R, strict=True)]
    return {name: _stacked([one[name] for one in each]) for name in FACTOR_NAMES}


def _stacked(tensors: Sequence[nn.Parameter | None]) -> nn.Parameter | None:
    values = [tensor.data for tensor in tensors if tensor is not None]
    return nn.Parameter(torch.stack(values), requires_grad=False) if values else None


def _present(stored: StoredFactors, name: str) -> Tensor:
    tensor = stored.tensors[name]
    assert tensor is not None, "only called where there is a pair"
    return tensor.data
