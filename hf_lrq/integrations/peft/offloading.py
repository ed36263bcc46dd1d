"""Layers whose weights accelerate keeps elsewhere between calls: there is nothing to adapt or to merge into."""

from collections.abc import Mapping
from typing import Any

from accelerate.hooks import SequentialHook
from torch import nn

from hf_lrq.errors import SpecError

OFFLOADING = ("cpu", "disk")


def check_none_is_offloaded(model: nn.Module, layers: Mapping[str, nn.Module], doing: str) -> None:
    """Refuse to work on offloaded layers.

    Args:
        model: that the layers are in.
        layers: name -> layer.
        doing: for the message, as in "cannot be merged".

    Raises:
        SpecError: naming the first.
    """
    # PEFT takes the hooks off while it loads an adapter, so they are not enough to go by.
    places = {str(part): str(device) for part, device in (getattr(model, "hf_device_map", None) or {}).items()}
    for name, layer in layers.items():
        if _has_offloading_hook(layer) or _is_offloaded(name, places):
            raise SpecError(
                f"Adapters cannot be {doing}: {name} is offloaded. Nothing was changed. Load the model without "
                "offloading, for example with device_map='cpu', and do it there."
            )


def _has_offloading_hook(layer: nn.Module) -> bool:
    if any(parameter.device.type == "meta" for parameter in layer.parameters()):
        return True
    hook: Any = getattr(layer, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return any(getattr(each, "offload", False) for each in hooks)


def _is_offloaded(name: str, places: Mapping[str, str]) -> bool:
    parts = [part for part in places if part == "" or f"{name}.".startswith(f"{part}.")]
    device = places[max(parts, key=len)] if parts else ""
    # A model that is on the CPU as a whole is where it belongs.
    return device == "disk" or (device == "cpu" and any(each not in OFFLOADING for each in places.values()))
