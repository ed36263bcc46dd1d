"""PEFT: an adapter type that trains the low-rank part of compressed layers, and LoRA beside it. Importing registers."""

from hf_lrq.integrations.peft.config import LRQAdapterConfig
from hf_lrq.integrations.peft.layer import LRQAdapterLinear
from hf_lrq.integrations.peft.model import LRQAdapterModel
from hf_lrq.integrations.peft.registration import register

__all__ = ["LRQAdapterConfig", "LRQAdapterLinear", "LRQAdapterModel"]

register()
