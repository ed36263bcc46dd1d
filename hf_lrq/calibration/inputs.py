"""Grams of the inputs of the layers of a compressed model, for what is done after compression."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.masks import Masks
from hf_lrq.decomposition import GramAccumulator, InputGram
from hf_lrq.nn import LRQLinear


@torch.no_grad()
def input_grams(model: nn.Module, batches: Iterable[Batch]) -> dict[str, InputGram]:
    """Name -> mean of x xᵀ over the inputs x of each compressed linear layer, as the layer gets them; without padding.

    Args:
        model: compressed; with or without adapters. It is left as it is.
        batches: token ids or arguments of the model, see `make_batches`. A few thousand tokens tell enough.

    Returns:
        For `riemannian_param_groups(model, grams=...)`. 4 bytes for each pair of input channels of each layer.

    Raises:
        CalibrationError: if no token reaches a layer, or its inputs are not finite or all zero.
    """
    sums: dict[str, GramAccumulator] = {}
    masks: list[Masks] = []

    def watch(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            sums[name].update(masks[-1].rows(name, x))

        return add

    handles = []
    runner = ModelRunner(model, list(batches))
    try:
        for path, module in model.named_modules():
            if isinstance(module, LRQLinear):
                name = path.removesuffix(".base_layer")  # In an adapter.
                sums[name] = GramAccumulator(module.in_features, module.weight.device)
                handles.append(module.register_forward_pre_hook(watch(name)))
        with as_for_inference(model):
            for index in range(len(runner)):
                masks.append(runner.masks(index))
                runner.run(index)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.finish() for name, total in sums.items()}
