"""Fast paths. A backend registers kernels for the operators of `ops`; the torch reference answers elsewhere."""

import torch

from hf_lrq.kernels.ops import linear
from hf_lrq.kernels.reference import hadamard

__all__ = ["backend_name", "hadamard", "linear"]


def backend_name(device: torch.device | str) -> str:
    """Which backend runs compressed layers on `device`."""
    return "torch (reference)"
