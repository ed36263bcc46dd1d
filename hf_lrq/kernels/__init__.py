"""Fast paths for compressed layers, behind operators whose definition is the torch reference."""

from hf_lrq.kernels.dispatch import ACTIVATIONS, BACKENDS, explain, has_backend, status
from hf_lrq.kernels.operands import Operands
from hf_lrq.kernels.ops import linear, linear_group
from hf_lrq.kernels.reference import hadamard

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Operands",
    "explain",
    "hadamard",
    "has_backend",
    "linear",
    "linear_group",
    "status",
]
