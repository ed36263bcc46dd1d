"""bitsandbytes NF4 (Dettmers et al., QLoRA, 2023): sixteen values for normal weights, in blocks of one scale."""

from importlib import import_module
from typing import Any

from torch import nn

from hf_lrq.cli.bench.candidates import Material
from hf_lrq.cli.bench.peers.base import MatrixPeer, Rounded


class BitsAndBytes(MatrixPeer):
    """NF4 in blocks of 64, with scales in float32, or in 8 bits ("double")."""

    by = "nf4"
    package = "bitsandbytes"
    variants = ("64", "64-double")

    def missing(self, material: Material) -> str | None:
        """Also whether it runs on this processor."""
        reason = super().missing(material)
        if reason is None:
            try:
                self.round(nn.Linear(64, 64, bias=False, device=next(material.original.parameters()).device))
            except Exception as error:  # Whatever a foreign library raises, it cannot run.
                reason = f"it cannot run here: {error}"
        return reason

    def round(self, layer: nn.Linear) -> Rounded:
        """The tensors are those that it writes into a state dict."""
        library: Any = import_module("bitsandbytes")
        found = library.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            quant_type="nf4",
            compress_statistics=self.variant.endswith("double"),
        )
        weight = layer.weight.detach().clone()
        found.weight = library.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=self.variant.endswith("double")
        )
        found = found.to(layer.weight.device)
        dense = library.functional.dequantize_4bit(found.weight.data, found.weight.quant_state)
        return Rounded(dense.view(layer.weight.shape), found.state_dict())
