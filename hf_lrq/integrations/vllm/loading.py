"""How vLLM's loaders reach the parts of a layer: by empty parameters that hand tensors on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.utils import set_weight_attrs

from hf_lrq.errors import CheckpointError
from hf_lrq.layout import TENSOR_NAMES
from hf_lrq.serving import Part, PlainPart

SHARD_INDEX = {"q": 0, "k": 1, "v": 2}
PARTS = "lrq_parts"


def add_parts(layer: nn.Module, parts: Sequence[Part | PlainPart], stored_as_one: bool) -> None:
    """Give a layer of vLLM its parts, and an empty parameter for each name of the format.

    Args:
        layer: of vLLM.
        parts: in the order of its shards.
        stored_as_one: whether the files hold all of them as one matrix.
    """
    setattr(layer, PARTS, nn.ModuleList(parts))
    for key in TENSOR_NAMES:
        of_key = [tensor for part in parts if (tensor := part._parameters.get(key)) is not None]
        if of_key:
            router = nn.Parameter(torch.empty(0, dtype=of_key[0].dtype), requires_grad=False)
            set_weight_attrs(router, {"weight_loader": _loader(parts, key, stored_as_one)})
            layer.register_parameter(key, router)


def parts_of(layer: nn.Module) -> Any:
    """The parts of a layer."""
    return getattr(layer, PARTS)


def _loader(parts: Sequence[Part | PlainPart], key: str, stored_as_one: bool) -> Callable[..., None]:
    def load(param: nn.Parameter, loaded_weight: Tensor, shard_id: str | int | None = None) -> None:
        if shard_id is None and (stored_as_one or len(parts) == 1):
            for part in parts:
                part.load(key, loaded_weight)
            return
        index = SHARD_INDEX.get(str(shard_id), shard_id)
        if not isinstance(index, int) or index >= len(parts):
            names = ", ".join(part.name for part in parts)
            raise CheckpointError(f"{key}: vLLM loads shard {shard_id!r} of a layer that is stored as {names}.")
        parts[index].load(key, loaded_weight)

    return load
