"""Operands of a layer come from its stored tensors, whoever holds them."""

import pytest
import torch

from hf_lrq.kernels import Operands, linear
from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer

LAYOUTS = [
    LayerLayout(codebook="e8p2", rank=5, factor_bits=4, rotation_block=8),
    LayerLayout(codebook="int4", rank=0, group_size=16, rotation="none"),
    LayerLayout(codebook="bt2", rank=3, factor_bits=8, ft_rank=2),
    LayerLayout(codebook="nf4", rank=0, ft_rank=1),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.codebook)
def test_tensors_of_a_file_compute_the_dense_weight(layout):
    layer = random_layer(40, 24, layout, bias=True)
    tensors = {name: tensor.data for name, tensor in layer.named_parameters() if name != "bias"}
    assert tensors.keys() == layout.tensors(24, 40).keys()
    operands = Operands.of(tensors, layout, layer.bias)
    assert (operands.out_features, operands.rank) == (24, layout.rank + layout.ft_rank)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x, operands), x @ layer.dense().T + layer.bias, rtol=1e-4, atol=1e-4)


def test_a_pair_takes_the_place_of_all_stored_factors():
    layout = LAYOUTS[2]
    layer = random_layer(40, 24, layout)
    L, R = torch.zeros(24, 1), torch.zeros(1, 40)
    operands = Operands.of(layer.stored_tensors(), layout, pair=(L, R))
    assert operands.L is L
    assert operands.R is R
    assert operands.L_scale is operands.R_scale is operands.bias is None
