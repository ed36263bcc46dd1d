"""The operator of a compressed layer: schema, shape rule and gradient. Backends only fill in the numbers."""

from typing import Any

import torch
from torch import Tensor

from hf_lrq.kernels import dispatch, reference

_LAYER = (
    "Tensor weight, Tensor scales, Tensor? rot_in, Tensor? rot_out, "
    "Tensor? L, Tensor? R, Tensor? L_scale, Tensor? R_scale, "
)
_FORMAT = "str codebook, int group_size, int block"
_RUN = "str backend, str activation"

torch.library.define("hf_lrq::linear", f"(Tensor x, {_LAYER}Tensor? bias, {_FORMAT}, {_RUN}) -> Tensor")
torch.library.define("hf_lrq::linear_backward", f"(Tensor grad, Tensor x, {_LAYER}{_FORMAT}, bool[] needs) -> Tensor[]")

# `None` is "every device".
torch.library.register_kernel("hf_lrq::linear", None, dispatch.lrq_linear)
torch.library.register_kernel("hf_lrq::linear_backward", None, reference.lrq_linear_backward)


@torch.library.register_fake("hf_lrq::linear")
def _(x: Tensor, weight: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    # One tensor on meta is enough to come here; what is returned for real inputs would be numbers that nobody computed.
    devices = {t.device for t in (x, weight, scales, *rest) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"the tensors of a compressed layer are on {', '.join(sorted(map(str, devices)))}.")
    return x.new_empty(*x.shape[:-1], scales.shape[0])


@torch.library.register_fake("hf_lrq::linear_backward")
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    rot_in: Tensor | None,
    rot_out: Tensor | None,
    L: Tensor | None,
    R: Tensor | None,
    L_scale: Tensor | None,
    R_scale: Tensor | None,
    codebook: str,
    group_size: int,
    block: int,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (x, scales, rot_in, rot_out, L, R)
    out = [
        t.new_empty(t.shape) if need and t is not None else grad.new_empty(0)
        for t, need in zip(inputs, needs[:6], strict=True)
    ]
    return [*out, grad.new_empty(grad.shape[-1]) if needs[6] else grad.new_empty(0)]


# Positions in the inputs of `linear` of the tensors that can have a gradient.
_DIFFERENTIABLE = {"x": 0, "scales": 2, "rot_in": 3, "rot_out": 4, "L": 5, "R": 6, "bias": 9}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.bias_dtype = None if inputs[9] is None else inputs[9].dtype
    ctx.format = inputs[10:13]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scales, rot_in, rot_out, L, R, L_scale, R_scale = ctx.saved_tensors
    needs = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE.values()]
    found = torch.ops.hf_lrq.linear_backward(
        grad.contiguous(), x, weight, scales, rot_in, rot_out, L, R, L_scale, R_scale, *ctx.format, needs
    )
    out: list[Tensor | None] = [None] * 15
    for position, need, gradient in zip(_DIFFERENTIABLE.values(), needs, found, strict=True):
        if need:
            out[position] = gradient
    if out[9] is not None:
        out[9] = out[9].to(ctx.bias_dtype)
    return tuple(out)


torch.library.register_autograd("hf_lrq::linear", _backward, setup_context=_setup_context)


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    rot_in: Tensor | None,
    rot_out: Tensor | None,
    L: Tensor | None,
    R: Tensor | None,
    L_scale: Tensor | None,
    R_scale: Tensor | None,
    bias: Tensor | None,
    codebook: str,
    group_size: int,
    block: int,
    backend: str = "auto",
    activation: str = "float",
) -> Tensor:
    """A compressed linear layer; differentiable in x, scales, rotations, float factors and bias.

    See `reference.lrq_linear` for the computation, and `layout.LayerLayout` for the tensors.

    Args:
        x: [..., in], float.
        backend: see `dispatch.BACKENDS`.
        activation: "float", or "int8": Q meets inputs that are rounded to 8 bits after the rotation, with one scale per
            256 columns, where the backend gains by it. Never where a gradient is wanted.

    Returns:
        [..., out], dtype of x; under autocast, as from nn.Linear, that of autocast.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        # Here, not in the operator: its products would be cast one by one, and its result not have the dtype of x.
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if activation != "float" and torch.is_grad_enabled():
        inputs = (x, scales, rot_in, rot_out, L, R, bias)
        if any(tensor is not None and tensor.requires_grad for tensor in inputs):
            activation = "float"
    result: Tensor = torch.ops.hf_lrq.linear(
        x,
        weight,
        scales,
        rot_in,
        rot_out,
        L,
        R,
        L_scale,
        R_scale,
        bias,
        codebook,
        group_size,
        block,
        backend,
        activation,
    )
    return result
