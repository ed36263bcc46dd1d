"""Pure-torch kernels: they run everywhere, and in float32 they define what every other backend must compute."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.base import cached_table
from hf_lrq.codebooks.decoding import decode_rows
from hf_lrq.kernels.operands import Operands
from hf_lrq.layout import hadamard_block
from hf_lrq.matrices import dense_factor, times_scales

TILE_WEIGHTS = 1 << 21  # Weights that are decoded at a time: what a layer needs beside its codes.


@cached_table
def _hadamard_matrix(block: int) -> Tensor:
    """[block, block] float64."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < block:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return H * block**-0.5


def hadamard(x: Tensor, largest: int) -> Tensor:
    """Block-diagonal orthonormal Walsh-Hadamard transform of the last axis; symmetric, so its own inverse.

    Args:
        x: [..., n].
        largest: size of the largest block; see `layout.hadamard_block` for the block that n gets.
    """
    block = hadamard_block(x.shape[-1], largest)
    if block == 1 or x.numel() == 0:
        return x
    # A product with a small cached matrix beats log2(block) strided passes, each of which reads and writes all of x.
    return (x.unflatten(-1, (-1, block)) @ _hadamard_matrix(x.device, x.dtype, block)).flatten(-2)


def times_codes(z: Tensor, layer: Operands) -> Tensor:
    """Q z, [..., out], in the dtype of z."""
    scales, group_size = layer.scales, layer.group_size
    return torch.cat([z @ _scaled(values, scales[part], group_size, z).T for part, values in _tiles(layer, z)], dim=-1)


def lrq_linear(x: Tensor, layer: Operands, times_Q: Callable[[Tensor, Operands], Tensor] = times_codes) -> Tensor:
    """y = rot_out * H_out(Q z + L (R z)) + bias with z = H_in(rot_in * x), in the dtype of x.

    For float16 what lies between is float32: a rotation adds up to sqrt(block) times the largest number to one, which
    overflows float16 where inputs and outputs are far from it.

    Args:
        x: [..., in], any float dtype.
        layer: its tensors, as stored.
        times_Q: computes Q z; backends that do no more than that give their own.

    Returns:
        [..., out].
    """
    if x.dtype == torch.float16:
        return lrq_linear(x.float(), layer, times_Q).half()
    z = _rotate_in(x, layer)
    y = times_Q(z, layer)
    if layer.L is not None and layer.R is not None:
        y = y + (z @ _factor(layer.R, layer.R_scale, 0, x).T) @ _factor(layer.L, layer.L_scale, 1, x).T
    if layer.rot_out is not None:
        y = hadamard(y, layer.block) * layer.rot_out.to(x.dtype)
    return y if layer.bias is None else y + layer.bias.to(x.dtype)


def lrq_linear_backward(grad: Tensor, x: Tensor, layer: Operands, needs: list[bool]) -> list[Tensor]:
    """Gradients of `lrq_linear` for (x, scales, rot_in, rot_out, L, R, bias), in that order.

    An input that does not need its gradient gets an empty tensor. Q is decoded again, tile by tile, rather than saved:
    keeping it would cost as much memory as the uncompressed layer.
    """
    if x.dtype == torch.float16:
        found = lrq_linear_backward(grad.float(), x.float(), layer, needs)
        return [g.to(x.dtype) if i in (0, 6) or not needs[i] else g for i, g in enumerate(found)]
    need_x, need_scales, need_rot_in, need_rot_out, need_L, need_R, need_bias = needs
    scales, rot_in, rot_out, L, R = layer.scales, layer.rot_in, layer.rot_out, layer.L, layer.R
    block, group_size = layer.block, layer.group_size
    out: list[Tensor] = [grad.new_empty(0) for _ in needs]
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # [tokens, out], [tokens, in]
    g = rows if rot_out is None else hadamard(rows * rot_out.to(grad.dtype), block)
    has_factors = L is not None and R is not None
    if L is not None and R is not None:
        dense_L, dense_R = _factor(L, layer.L_scale, 1, grad), _factor(R, layer.R_scale, 0, grad)
    z = _rotate_in(inputs, layer) if need_scales or need_rot_out or need_L or need_R else None
    gz = torch.zeros_like(inputs) if need_x or need_rot_in else None
    outputs, scale_gradients = [], []
    if gz is not None or need_scales or need_rot_out:
        for part, values in _tiles(layer, x):
            Q = _scaled(values, scales[part], group_size, x)
            if gz is not None:
                gz = gz.addmm_(g[:, part], Q)
            if z is not None and need_rot_out:
                outputs.append(z @ Q.T)
            if z is not None and need_scales:
                scale_gradients.append(_scale_gradient(g[:, part], z, values, scales[part], group_size))
    if gz is not None:
        if has_factors:
            gz = gz.addmm_(g @ dense_L, dense_R)
        gx = gz if rot_in is None else hadamard(gz, block)  # with respect to rot_in * x
        if rot_in is not None and need_rot_in:
            out[2] = (gx * inputs).sum(0).to(rot_in.dtype)
        if need_x:
            out[0] = (gx if rot_in is None else gx * rot_in.to(gx.dtype)).reshape(x.shape)
    if z is not None:
        if need_scales:
            out[1] = torch.cat(scale_gradients).to(scales.dtype)
        if rot_out is not None and need_rot_out:
            y = torch.cat(outputs, dim=-1) + ((z @ dense_R.T) @ dense_L.T if has_factors else 0)
            out[3] = (rows * hadamard(y, block)).sum(0).to(rot_out.dtype)
        if L is not None and need_L:
            out[4] = (g.T @ (z @ dense_R.T)).to(L.dtype)
        if R is not None and need_R:
            out[5] = ((g @ dense_L).T @ z).to(R.dtype)
    if need_bias:
        out[6] = rows.sum(0)
    return out


def _rotate_in(x: Tensor, layer: Operands) -> Tensor:
    return x if layer.rot_in is None else hadamard(x * layer.rot_in.to(x.dtype), layer.block)


def _tiles(layer: Operands, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of Q without scales, so many at a time that they take little memory: (which rows, [rows, in] float32)."""
    block = get_codebook(layer.codebook).row_block
    step = max(TILE_WEIGHTS // max(x.shape[-1], 1) // block, 1) * block
    for start in range(0, layer.out_features, step):
        stop = min(start + step, layer.out_features)
        yield slice(start, stop), decode_rows(layer.weight, layer.codebook, x.shape[-1], start, stop)


def _scaled(values: Tensor, scales: Tensor, group_size: int, x: Tensor) -> Tensor:
    """Rows of Q in the dtype of x."""
    return times_scales(values, scales.float(), group_size).to(x.dtype)


def _scale_gradient(g: Tensor, z: Tensor, values: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Gradient of the scales of some rows, like them [rows] or [rows, groups].

    Args:
        g, z: [tokens, rows] and [tokens, in].
        values: [rows, in], without scales.
    """
    per_weight = (g.T @ z) * values.to(g.dtype)  # [rows, in]
    if scales.ndim > 1:
        padding = scales.shape[1] * group_size - per_weight.shape[1]
        per_weight = torch.nn.functional.pad(per_weight, (0, padding)).unflatten(1, (-1, group_size))
    return per_weight.sum(-1)


def _factor(data: Tensor, scale: Tensor | None, rank_dim: int, like: Tensor) -> Tensor:
    return dense_factor(data, scale, rank_dim).to(like.dtype)
