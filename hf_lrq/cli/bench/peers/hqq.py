"""HQQ (Badri and Shaji, Half-Quadratic Quantization, 2023): integers in groups, zero points fitted without data."""

from importlib import import_module
from typing import Any

import torch
from torch import nn

from hf_lrq.cli.bench.peers.base import MatrixPeer, Rounded


class HQQ(MatrixPeer):
    """Bits and weights in a group, along the inputs; scales and zero points are float16."""

    by = "hqq"
    package = "hqq"
    variants = ("2-16", "2-32", "2-64", "3-64", "4-64", "8-64")

    def round(self, layer: nn.Linear) -> Rounded:
        """Codes as it packs them."""
        quantizer: Any = import_module("hqq.core.quantize").Quantizer
        bits, group = map(int, self.variant.split("-"))
        packed, meta = quantizer.quantize(
            layer.weight.detach(),
            nbits=bits,
            group_size=group,
            axis=1,
            optimize=True,
            compute_dtype=torch.float16,
            device=str(layer.weight.device),
        )
        tensors = {"W_q": packed, "scale": meta["scale"].half(), "zero": meta["zero"].half()}
        meta = {
            **meta,
            "scale": tensors["scale"].float(),
            "zero": tensors["zero"].float(),
            "compute_dtype": torch.float32,
        }
        dense = quantizer.dequantize(packed, meta)
        return Rounded(dense.view(layer.weight.shape), tensors)
