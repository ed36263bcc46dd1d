"""Gradients of the loss by weights that are codes: from inputs and gradients of outputs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.errors import CalibrationError
from hf_lrq.integrations.peft.layer import AdapterLinear
from hf_lrq.work.memory import in_groups

BUDGET = 4 << 30  # Bytes of the gradients that are in memory at a time; more layers get passes of their own.


def groups_of(layers: Sequence[AdapterLinear]) -> Iterator[list[AdapterLinear]]:
    """Layers whose gradients fit into the budget together; at least one."""
    return in_groups(layers, lambda layer: 4 * layer.out_features * layer.in_features, BUDGET)


def mean_gradients(
    model: nn.Module, layers: Sequence[AdapterLinear], adapter: str, batches: Sequence[Mapping[str, Any]]
) -> list[Tensor]:
    """Of each layer the gradient [out, in] of the loss by its weight, float32, averaged over the batches.

    No gradient of a parameter is kept, and the model runs as for inference.

    Args:
        model: returns a `loss`.
        layers: of this model, with an active adapter that is trained, whose gradient shows the way.
        adapter: its name.
        batches: arguments of the model.

    Raises:
        CalibrationError: if the model returns no loss, or gradients are not finite.
    """
    ends = [layer.get_parameter(f"lrq_C.{adapter}") for layer in layers]
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    sums = [torch.zeros(shape, device=end.device) for shape, end in zip(shapes, ends, strict=True)]
    handles = [layer.register_forward_hook(_adding(total)) for layer, total in zip(layers, sums, strict=True)]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for index, batch in enumerate(batches):
            loss = getattr(model(**batch), "loss", None)
            if not isinstance(loss, Tensor):
                raise CalibrationError(f"batch {index}: {type(model).__name__} returns no loss. Give labels with it.")
            torch.autograd.grad(loss, ends, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    if not all(torch.isfinite(total).all() for total in sums):
        raise CalibrationError("gradients are NaN or Inf. Run the model in bfloat16 or float32.")
    return [total / len(batches) for total in sums]


def _adding(total: Tensor) -> Any:
    """A hook on a layer that adds g^T x to a sum, g the gradient that comes back to its output."""

    def note(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        x = args[0].detach()

        def add(gradient: Tensor) -> None:
            total.add_(gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float())

        y.register_hook(add)

    return note
