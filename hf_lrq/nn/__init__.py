"""Modules made of compressed matrices."""

from hf_lrq.nn.experts import LRQExpertStack
from hf_lrq.nn.linear import LRQLinear

__all__ = ["LRQExpertStack", "LRQLinear"]
