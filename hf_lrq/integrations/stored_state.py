"""What `save_pretrained` writes of a compressed model: tensors in the dtypes of the format, and the record of them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_lrq.checkpoint import QuantizationHeader
from hf_lrq.digests import Record, fingerprint, tensor_digest
from hf_lrq.integrations.conversions import names_of_kept
from hf_lrq.nn import COMPRESSED, LRQExpertStack, LRQLinear
from hf_lrq.nn.soundness import ROTATION_NAMES, are_signs
from hf_lrq.safetensors_headers import dtype_name, is_known


def note_trained_rotations(model: Any) -> None:
    """Make the layouts say which rotations are no signs any more."""
    for module in model.modules():
        if not isinstance(module, LRQLinear | LRQExpertStack) or module.layout.rotation != "hadamard":
            continue
        stored = {name: getattr(module, name) for name in ROTATION_NAMES}
        if not are_signs(stored.values()):
            module.layout = replace(module.layout, rotation="trained")


def state_and_metadata(
    model: Any, header: QuantizationHeader, original_names: bool = True
) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    """The tensors to be saved, None for those of `state_dict`, and the metadata of their files.

    Tensors that a cast of the whole model has changed are stored in the dtype of the format.

    Args:
        model: a PreTrainedModel with compressed layers.
        header: what config.json will say of it.
        original_names: whether tensors get the names, and the arrangement, of the original checkpoint.
    """
    changed: dict[str, Tensor] = {}
    casts: dict[int, Tensor] = {}  # Tied tensors stay tied.
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, COMPRESSED):
            continue
        for key, layout in module.layout.tensors(module.out_features, module.in_features).items():
            tensor = getattr(module, key)
            if tensor.dtype != layout.dtype and tensor.device.type != "meta":
                changed[f"{name}.{key}"] = casts.setdefault(id(tensor), tensor.to(layout.dtype))
    state = {**model.state_dict(), **changed}
    # Files of adapters hold none of these tensors.
    own_files = not getattr(model, "_hf_peft_config_loaded", False)
    metadata = _record_of(model, state, header, original_names).to_metadata() if own_files else {}
    return (state if changed else None), metadata


def _record_of(model: Any, state: dict[str, Tensor], header: QuantizationHeader, original_names: bool) -> Record:
    kept = {name: tensor for name, tensor in state.items() if name not in (model._keys_to_ignore_on_save or ())}
    kept = remove_tied_weights_from_state_dict(kept, model)
    stored = names_of_kept(kept, model) if original_names else dict(zip(kept, kept, strict=True))
    return Record(fingerprint(header.to_dict()), dict(_digests(model, kept, stored)))


def _digests(model: Any, state: dict[str, Tensor], stored: dict[str, str]) -> Iterator[tuple[str, str | None]]:
    """Names in the files and digests; None, by the name in the model, for what saving rearranges or gathers."""
    for name, tensor in state.items():
        if tensor.device.type == "meta" and hasattr(model, "hf_device_map"):
            tensor = load_offloaded_parameter(model, name)
        whole = type(tensor).__name__ != "DTensor" and tensor.device.type != "meta" and is_known(tensor.dtype)
        if name not in stored or not whole:
            yield name, None
            continue
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield stored[name], tensor_digest(dtype_name(tensor.dtype), tensor.shape, memoryview(data))
