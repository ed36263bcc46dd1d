"""Fast paths. A backend registers kernels for the operators of `ops`; the torch reference answers elsewhere."""

from hf_lrq.kernels.ops import linear
from hf_lrq.kernels.reference import hadamard

__all__ = ["hadamard", "linear"]
