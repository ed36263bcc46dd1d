"""Fast paths for compressed layers, behind operators whose definition is the torch reference."""

from hf_lrq.kernels.backend import Backend, known_backends
from hf_lrq.kernels.dispatch import ACTIVATIONS, explain, has_backend, register_backend, status
from hf_lrq.kernels.operands import Operands
from hf_lrq.kernels.ops import linear, linear_experts, linear_group
from hf_lrq.kernels.reference import hadamard

__all__ = [
    "ACTIVATIONS",
    "Backend",
    "Operands",
    "explain",
    "hadamard",
    "has_backend",
    "known_backends",
    "linear",
    "linear_experts",
    "linear_group",
    "register_backend",
    "status",
]
