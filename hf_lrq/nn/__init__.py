"""Modules made of compressed matrices."""

from hf_lrq.nn.experts import LRQExpertStack
from hf_lrq.nn.groups import fuse_layers, unfuse_layers
from hf_lrq.nn.linear import LRQLinear
from hf_lrq.nn.refit import Refit, refit_factors

__all__ = ["LRQExpertStack", "LRQLinear", "Refit", "fuse_layers", "refit_factors", "unfuse_layers"]
