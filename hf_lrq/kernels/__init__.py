"""Fast paths for compressed layers, behind operators whose definition is the torch reference."""

from hf_lrq.kernels.dispatch import ACTIVATIONS, BACKENDS, explain, has_backend, status
from hf_lrq.kernels.ops import linear
from hf_lrq.kernels.reference import hadamard

__all__ = ["ACTIVATIONS", "BACKENDS", "explain", "hadamard", "has_backend", "linear", "status"]
