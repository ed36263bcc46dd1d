"""The dtype of a model of transformers with compressed layers: that of what is not compressed.

transformers takes the dtype of the first floating-point parameter, casts inputs to it, and writes it into config.json.
Factors and scales are in float16 whatever the model computes in.
"""

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lrq.layout import TENSOR_NAMES
from hf_lrq.nn import COMPRESSED

# The property of transformers, also when this module is imported again.
_property: Any = PreTrainedModel.dtype
_of_first_parameter = _property.fget
_of_first_parameter = getattr(_of_first_parameter, "__wrapped__", _of_first_parameter)


def dtype_of_uncompressed(model: nn.Module) -> torch.dtype | None:
    """That of the first floating-point parameter that is no part of a compressed matrix; None if there is none."""
    for module in model.modules():
        stored = TENSOR_NAMES if isinstance(module, COMPRESSED) else ()
        for name, parameter in module._parameters.items():
            if parameter is not None and name not in stored and parameter.is_floating_point():
                return parameter.dtype
    return None


@functools.wraps(_of_first_parameter)
def _dtype(self: Any) -> torch.dtype:
    found = dtype_of_uncompressed(self)
    if found is not None:
        return found
    # Compressed as a whole: what it was loaded in, which is a name once it has been saved.
    configured = getattr(self.config, "dtype", None)
    configured = getattr(torch, configured, None) if isinstance(configured, str) else configured
    return configured if isinstance(configured, torch.dtype) else _of_first_parameter(self)


def report_uncompressed_dtype() -> None:
    """Let `PreTrainedModel.dtype` pass over compressed matrices; for models without any it is what it was."""
    PreTrainedModel.dtype = property(_dtype)


def keep_dtypes_on_disk(model: Any) -> None:
    """Make tensors that are offloaded to the checkpoint's files come back in their dtypes.

    Before transformers 5.13 accelerate is told to read all of them in the dtype of the model, codes and factors too.
    """
    # TODO: drop when transformers>=5.13 is the floor.
    places: dict[str, Any] = {}
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        places |= getattr(getattr(weights, "dataset", None), "index", {})
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in places and "safetensors_file" in places[name]:
            places[name]["dtype"] = str(tensor.dtype).removeprefix("torch.")
