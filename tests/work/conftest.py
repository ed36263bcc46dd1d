"""Modules that hold matrices, one of each kind, and a spec that takes milliseconds."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lrq.spec import CompressionSpec, LayerSpec


class Homes(nn.Module):
    """A linear layer, a transposed one, and fused experts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 24)
        self.inner = nn.Sequential(Conv1D(24, 32))
        config = transformers.MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=3)
        self.experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts(config)


@pytest.fixture
def homes() -> nn.Module:
    """Random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Homes()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def spec() -> CompressionSpec:
    """Coarse, and fast."""
    return CompressionSpec(
        default=LayerSpec(
            bits=3, rank=2, codebook="int", group_size=32, rounding="nearest", iters=1, refinements=0, sweeps=0
        )
    )
