"""The operators of compressed layers: schema, shape rule and gradient. Backends only fill in the numbers."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lrq.kernels import dispatch, reference
from hf_lrq.kernels.operands import TENSORS, Operands, by_field, by_layer, one_by_one

_REQUIRED, _OPTIONAL = ("weight", "scales"), ("rot_in", "rot_out", "L", "R", "L_scale", "R_scale", "bias")
_FORMAT = "str codebook, int group_size, int block"
_RUN = "str backend, str activation"


def _tensors(suffix: str = "", names: Iterable[str] = (*_REQUIRED, *_OPTIONAL)) -> str:
    """Declarations of the tensors of a layer."""
    return ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''}{suffix} {name}" for name in names)


_WITHOUT_BIAS = _tensors(names=(*_REQUIRED, *_OPTIONAL[:-1]))
torch.library.define("hf_lrq::linear", f"(Tensor x, {_tensors()}, {_FORMAT}, {_RUN}) -> Tensor")
# Without gradient: two passes through Python less, which small layers feel.
torch.library.define("hf_lrq::linear_inference", f"(Tensor x, {_tensors()}, {_FORMAT}, {_RUN}) -> Tensor")
torch.library.define("hf_lrq::linear_group", f"(Tensor x, {_tensors('[]')}, {_FORMAT}, {_RUN}) -> Tensor[]")
torch.library.define(
    "hf_lrq::linear_experts", f"(Tensor x, Tensor counts, {_tensors('[]')}, {_FORMAT}, {_RUN}) -> Tensor[]"
)
torch.library.define(
    "hf_lrq::linear_backward", f"(Tensor grad, Tensor x, {_WITHOUT_BIAS}, {_FORMAT}, bool[] needs) -> Tensor[]"
)


def _linear(x: Tensor, *arguments: Any) -> Tensor:
    *layer, backend, activation = arguments
    return dispatch.lrq_linear(x, Operands(*layer), backend, activation)


def _linear_with_gradient(x: Tensor, *arguments: Any) -> Tensor:
    y = _linear(x, *arguments)
    # Nothing may be written into a view that an operator with a gradient returns, as x += residual does.
    return y.clone() if torch.Tensor._is_view(y) else y


def _linear_inference(x: Tensor, *arguments: Any) -> Tensor:
    _refuse_gradients(x, [Operands(*arguments[:-2])])
    return _linear(x, *arguments)


def _linear_group(x: Tensor, *arguments: Any) -> list[Tensor]:
    *fields, backend, activation = arguments
    layers = by_layer(fields[:TENSORS], *fields[TENSORS:])
    _refuse_gradients(x, layers)
    return dispatch.lrq_linear_group(x, layers, backend, activation)


def _linear_experts(x: Tensor, counts: Tensor, *arguments: Any) -> list[Tensor]:
    *fields, backend, activation = arguments
    stacks = by_layer(fields[:TENSORS], *fields[TENSORS:])
    _refuse_gradients(x, stacks)
    return dispatch.lrq_linear_experts(x, counts.tolist(), stacks, backend, activation)


def _refuse_gradients(x: Tensor, layers: Sequence[Operands]) -> None:
    """Refuse inputs that need gradients: a graph captured without them can get such inputs, and would lose them."""
    if any(_wants_gradient(x, layer) for layer in layers):
        raise RuntimeError(
            "this graph of compressed layers was captured without gradients and has none. Capture it with an input or "
            "a factor that requires its gradient, or run it under torch.no_grad()."
        )


def _linear_backward(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    *layer, needs = arguments
    return reference.lrq_linear_backward(grad, x, _without_bias(layer), needs)


def _without_bias(layer: Sequence[Any]) -> Operands:
    return Operands._make((*layer[: TENSORS - 1], None, *layer[TENSORS - 1 :]))


# For every device. `torch.library.register_kernel` wraps functions once more, which small layers feel.
_library = torch.library.Library("hf_lrq", "FRAGMENT")
for _name, _kernel in (
    ("linear", _linear_with_gradient),
    ("linear_inference", _linear_inference),
    ("linear_group", _linear_group),
    ("linear_experts", _linear_experts),
    ("linear_backward", _linear_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")


def _empty_outputs(x: Tensor, layers: Sequence[Operands]) -> list[Tensor]:
    # One tensor on meta is enough to come here; what is returned for real inputs would be numbers that nobody computed.
    tensors = (x, *(tensor for layer in layers for tensor in layer.tensors))
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise RuntimeError(f"the tensors of a compressed layer are on {', '.join(sorted(map(str, devices)))}.")
    return [x.new_empty(*x.shape[:-1], layer.out_features) for layer in layers]


def _fake_linear(x: Tensor, *arguments: Any) -> Tensor:
    return _empty_outputs(x, [Operands(*arguments[:-2])])[0]


torch.library.register_fake("hf_lrq::linear", _fake_linear)
torch.library.register_fake("hf_lrq::linear_inference", _fake_linear)


@torch.library.register_fake("hf_lrq::linear_group")
def _(x: Tensor, *arguments: Any) -> list[Tensor]:
    return _empty_outputs(x, by_layer(arguments[:TENSORS], *arguments[TENSORS:-2]))


@torch.library.register_fake("hf_lrq::linear_experts")
def _(x: Tensor, counts: Tensor, *arguments: Any) -> list[Tensor]:
    stacks = by_layer(arguments[:TENSORS], *arguments[TENSORS:-2])
    return _empty_outputs(x, [stack.layer(0) for stack in stacks])


@torch.library.register_fake("hf_lrq::linear_backward")
def _(grad: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    layer, needs = _without_bias(arguments[:-1]), arguments[-1]
    inputs = (x, layer.scales, layer.rot_in, layer.rot_out, layer.L, layer.R)
    out = [
        t.new_empty(t.shape) if need and t is not None else grad.new_empty(0)
        for t, need in zip(inputs, needs[:6], strict=True)
    ]
    return [*out, grad.new_empty(grad.shape[-1]) if needs[6] else grad.new_empty(0)]


# Positions in the inputs of `linear` of the tensors that can have a gradient.
_DIFFERENTIABLE = {"x": 0, "scales": 2, "rot_in": 3, "rot_out": 4, "L": 5, "R": 6, "bias": 9}


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.bias_dtype = None if inputs[TENSORS] is None else inputs[TENSORS].dtype
    ctx.format = inputs[TENSORS + 1 : -2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE.values()]
    found = torch.ops.hf_lrq.linear_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.format, needs)
    out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for position, need, gradient in zip(_DIFFERENTIABLE.values(), needs, found, strict=True):
        if need:
            out[position] = gradient
    if (of_bias := out[TENSORS]) is not None:
        out[TENSORS] = of_bias.to(ctx.bias_dtype)
    return tuple(out)


torch.library.register_autograd("hf_lrq::linear", _backward, setup_context=_setup_context)


def linear(x: Tensor, layer: Operands, backend: str = "auto", activation: str = "float") -> Tensor:
    """A compressed linear layer; differentiable in x, scales, rotations, float factors and bias.

    See `reference.lrq_linear` for the computation.

    Args:
        x: [..., in], float.
        layer: the tensors of the layer.
        backend: see `dispatch.chosen`.
        activation: "float", or "int8": Q meets inputs that are rounded to 8 bits after the rotation, with one scale per
            256 columns, where the backend gains by it. Never where a gradient is wanted.

    Returns:
        [..., out], dtype of x; under autocast, as from nn.Linear, that of autocast.
    """
    operator = torch.ops.hf_lrq.linear_inference
    if _wants_gradient(x, layer):
        operator, activation = torch.ops.hf_lrq.linear, "float"
    elif torch.compiler.is_compiling() or torch.jit.is_tracing():
        operator = torch.ops.hf_lrq.linear  # Who runs the graph may want gradients.
    result: Tensor = operator(_cast(x), *layer, backend, activation)
    return result


def linear_group(
    x: Tensor, layers: Sequence[Operands], backend: str = "auto", activation: str = "float"
) -> list[Tensor]:
    """`linear` of one x with several layers, which need the transform of x only once.

    Args:
        x: [..., in], float.
        layers: layers of one codebook, group size and block; computed together where their rot_in are equal (on
            GPUs: one tensor, as values cannot be read without waiting).

    Returns:
        One tensor [..., out] per layer.

    Raises:
        ValueError: if codebook, group size or block differ.
    """
    form = _form_of_all(layers)
    captured = torch.compiler.is_exporting() or torch.jit.is_tracing()  # Who runs the graph may want gradients.
    if captured or any(_wants_gradient(x, layer) for layer in layers):
        return [linear(x, layer, backend, activation) for layer in layers]
    found: list[Tensor] = torch.ops.hf_lrq.linear_group(_cast(x), *by_field(layers), *form, backend, activation)
    return found


def linear_experts(
    x: Tensor, counts: Tensor, stacks: Sequence[Operands], backend: str = "auto", activation: str = "float"
) -> list[Tensor]:
    """`linear` of rows that are sorted by experts, each with the layer of its expert: one operator for all of them.

    Args:
        x: [n, in], float: the first counts[0] rows are those of the first expert, and so on.
        counts: [experts] integers, whose sum is n at most.
        stacks: see `Operands.of_stack`, all for the same rows; of one codebook, group size and block.
        backend, activation: see `linear`.

    Returns:
        One tensor [n, out] per stack; zeros in the rows after the last expert's.

    Raises:
        ValueError: if codebook, group size or block differ.
    """
    form = _form_of_all(stacks)
    if any(_wants_gradient(x, stack) for stack in stacks):
        each = lambda rows, layers: [linear(rows, layer, backend, activation) for layer in layers]  # noqa: E731
        return one_by_one(_cast(x), counts.tolist(), stacks, each)
    found: list[Tensor] = torch.ops.hf_lrq.linear_experts(
        _cast(x), counts, *by_field(stacks), *form, backend, activation
    )
    return found


def _form_of_all(layers: Sequence[Operands]) -> tuple[Any, ...]:
    """Codebook, group size and block."""
    forms = {layer[TENSORS:] for layer in layers}
    if len(forms) > 1:
        told = " and ".join(map(str, sorted(forms)))
        raise ValueError(f"layers of a group have one (codebook, group size, block), got {told}.")
    return layers[0][TENSORS:]


def _cast(x: Tensor) -> Tensor:
    """x in the dtype of autocast where that is on, unless x is float64; in the operator each product would be cast."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _wants_gradient(x: Tensor, layer: Operands) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *layer.tensors)
    )
