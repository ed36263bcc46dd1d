"""Random layers: as large as real ones, and the same for the same seed."""

import pytest
import torch

from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer


@pytest.mark.parametrize(
    "layout",
    [
        LayerLayout(codebook="bt2", rank=4, factor_bits=8),
        LayerLayout(codebook="e8p3", rank=3, factor_bits=4),
        LayerLayout(codebook="int4", rank=0, group_size=16, rotation="none"),
        LayerLayout(codebook="tcq3", rank=2, ft_rank=3),
    ],
    ids=lambda layout: layout.codebook,
)
def test_outputs_are_about_as_large_as_inputs(layout, rng_untouched):
    layer = random_layer(256, 128, layout, bias=True, dtype=torch.bfloat16, seed=3)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert 0.3 < layer(x).std() < 4
    assert layer.bias.dtype == torch.bfloat16
    again = random_layer(256, 128, layout, bias=True, dtype=torch.bfloat16, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
