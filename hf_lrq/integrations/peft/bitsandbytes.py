"""Adapters around layers that bitsandbytes keeps in 4 or 8 bits (QLoRA, 2023): beside the layer, which is one matrix.

Modes that train a part of L R start from the leading singular vectors of the rounded weight, L R = U S V^T; the adapter
keeps them, and adds L' R' - L R to the layer. The weight itself stays as it is, also where PiSSA (2024), which mode
"head:k" then comes to, would replace it by what is left.
"""

import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.decomposition.lowrank import truncated_svd
from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.layer import KEPT, TRAINED, AdapterLinear
from hf_lrq.integrations.peft.modes import Mode
from hf_lrq.matrices import Pair

START = ("lrq_top_L", "lrq_top_R")


def bits_of(module: nn.Module) -> int | None:
    """4 or 8 for a linear layer of bitsandbytes whose weight is codes, else None."""
    library: Any = sys.modules.get("bitsandbytes")  # Where nobody has imported it, no layer is of it.
    if library is None or not isinstance(module, library.nn.Linear4bit | library.nn.Linear8bitLt):
        return None
    if isinstance(module, library.nn.Linear4bit):
        return 4
    floats: bool = module.state.has_fp16_weights
    return None if floats else 8


def dense_weight(layer: nn.Linear) -> Tensor:
    """The rounded weight of such a layer, [out, in] float32."""
    # On some CPUs a forward pass puts codes into another order; asking for the state puts them back.
    state = layer.state_dict()
    if bits_of(layer) == 8:
        return plain(state["weight"]).float() * (plain(state["SCB"]) / 127)[:, None]
    weight: Any = layer.weight
    return plain(sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)).float()


def plain(x: Tensor) -> Tensor:
    """x as a tensor of torch's own class, without a graph."""
    return x.detach().as_subclass(Tensor)


def fingerprint(layer: nn.Linear) -> str:
    """Shape, bits and a checksum of the codes of the first row."""
    bits = bits_of(layer)
    assert bits is not None, "the caller has asked"
    codes = plain(layer.state_dict()["weight"]).cpu().contiguous().view(torch.uint8)
    first = codes.flatten()[: max(1, layer.in_features * bits // 8)]
    checksum = zlib.crc32(first.numpy().tobytes())
    return f"{layer.out_features} x {layer.in_features} of {bits} bits, codes {checksum:08x}"


def misfit(mode: Mode, layer: nn.Linear) -> str | None:
    """Why a mode cannot be used on such a layer, or None."""
    if mode.outside:
        return mode.misfit(layer.out_features, layer.in_features, 0)
    if mode.number is None:
        return (
            "bitsandbytes keeps its weight as one matrix, without factors L and R. Mode 'append:r' gives it some, "
            "'head:k' and 'spectral:k' start from its k leading singular vectors"
        )
    most = min(layer.out_features, layer.in_features)
    return f"its weight has {most} singular values, the adapter asks for {mode.number}" if mode.number > most else None


def check_none_is_merged(model: nn.Module) -> None:
    """Refuse to merge into layers of bitsandbytes.

    Raises:
        SpecError: naming the first that has an adapter of ours.
    """
    for name, module in model.named_modules():
        if isinstance(module, BitsAndBytesAdapterLinear):
            raise SpecError(refused_merge(name, module.get_base_layer()))


def refused_merge(name: str, layer: nn.Linear) -> str:
    """What to say to who wants to merge."""
    return (
        f"Adapters cannot be merged into {name}: bitsandbytes keeps it in {bits_of(layer)} bits, and would round the "
        "sum anew, by more than most adapters change. Nothing was changed. Keep the adapter beside the model; or merge "
        "it into the original: hf_lrq.export_lora(model, DIR), load the model without quantization_config, and "
        "PeftModel.from_pretrained(model, DIR).merge_and_unload()."
    )


class BitsAndBytesAdapterLinear(AdapterLinear):
    """A layer of bitsandbytes with adapters.

    Attributes:
        lrq_top_L, lrq_top_R: adapter -> what it started from, [out, k] and [k, in], where that was not zero.
    """

    tensors = (*TRAINED, *KEPT, *START)
    other_param_names = (*KEPT, *START, "modes")

    def start_of(self, mode: Mode, generator: torch.Generator) -> tuple[Pair, Mapping[str, Tensor]]:
        """See `AdapterLinear`: leading singular vectors of the weight, or no ranks for modes that stand beside it."""
        layer: nn.Linear = self.get_base_layer()
        if mode.outside:
            scales = torch.empty(0, device=layer.weight.device)
            return (scales.new_zeros(layer.out_features, 0), scales.new_zeros(0, layer.in_features)), {}
        assert mode.number is not None, "misfit asks for it"
        U, sigma, Vt = truncated_svd(dense_weight(layer), mode.number, generator)
        root = sigma.sqrt()
        L, R = U * root, root.unsqueeze(1) * Vt
        return (L, R), dict(zip(START, (L, R), strict=True))

    def _through(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `AdapterLinear`."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return self._plus(y, x, [self._added(name) for name in adapters if self.holds(name)])

    def _added(self, adapter: str) -> Pair:
        """What this pass adds to the weight, in the dtype of the adapter."""
        if self.modes[adapter].outside:
            return self._pair_beside(adapter)
        own = self.own(adapter)
        with torch.autocast(own[START[0]].device.type, enabled=False):
            return self.modes[adapter].change(own[START[0]], own[START[1]], own)

    def outer_change_of(self, adapter: str) -> Pair:
        """See `AdapterLinear`."""
        with torch.no_grad():
            own = {name: tensor.float() for name, tensor in self.own(adapter).items()}
            none = next(iter(own.values()))
            return self.modes[adapter].change(own.get(START[0], none), own.get(START[1], none), own)

    def factor_gram(self, H: Tensor, adapter: str) -> Tensor:
        """See `AdapterLinear`; there are no rotations."""
        return H

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not into codes of bitsandbytes.

        Raises:
            SpecError: always.
        """
        raise SpecError(refused_merge("this layer", self.get_base_layer()))
