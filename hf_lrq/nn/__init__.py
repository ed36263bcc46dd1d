"""Modules made of compressed matrices."""

from hf_lrq.nn.embedding import LRQEmbedding, LRQHead
from hf_lrq.nn.experts import LRQExpertStack
from hf_lrq.nn.groups import fuse_layers, unfuse_layers
from hf_lrq.nn.linear import LRQLinear
from hf_lrq.nn.refit import Refit, refit_factors

# What holds codes; a tuple, as isinstance takes it.
COMPRESSED = (LRQLinear, LRQExpertStack, LRQEmbedding)

__all__ = [
    "COMPRESSED",
    "LRQEmbedding",
    "LRQExpertStack",
    "LRQHead",
    "LRQLinear",
    "Refit",
    "fuse_layers",
    "refit_factors",
    "unfuse_layers",
]
