"""Shards of a compressed matrix: parts of the rows stand side by side, parts of the columns add up to the whole."""

from itertools import pairwise

import pytest
import torch

from hf_lrq.codebooks import get_codebook, known_families
from hf_lrq.errors import SpecError
from hf_lrq.kernels import Operands, linear
from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer

CODEBOOKS = [f"{family}{bits[0]}" for family, bits in known_families().items()]
OUT, IN = 384, 256


def outputs(layer, x, side, cuts):
    """The output of each shard of `layer`, which holds the features between two cuts."""
    features = layer.out_features if side == "out" else layer.in_features
    found = []
    for start, stop in pairwise(cuts):
        tensors = {
            name: layer.layout.shard(name, tensor, side, features, start, stop)
            for name, tensor in layer.stored_tensors().items()
        }
        own = x if side == "out" else x[..., start:stop].contiguous()
        found.append(linear(own, Operands.of(tensors, layer.layout), backend="torch"))
    return found


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("rotation", ["hadamard", "none"])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_shards_together_are_the_dense_layer(codebook, rotation, factor_bits, generator):
    layout = LayerLayout(
        codebook=codebook, rank=7, factor_bits=factor_bits, rotation=rotation, rotation_block=64, ft_rank=2
    )
    layer = random_layer(IN, OUT, layout)
    x = torch.randn(3, IN, generator=generator)
    dense = x @ layer.dense().T
    parts = torch.cat(outputs(layer, x, "out", (0, 128, OUT)), -1)
    torch.testing.assert_close(parts, dense, rtol=1e-4, atol=1e-4)
    summands = outputs(layer, x, "in", (0, 128, IN))
    torch.testing.assert_close(sum(summands), dense, rtol=1e-4, atol=1e-4)


def test_shards_keep_more_ranks_than_they_have_rows(generator):
    layer = random_layer(64, 64, LayerLayout(codebook="e8p2", rank=60, rotation_block=16))
    x = torch.randn(3, 64, generator=generator)
    parts = torch.cat(outputs(layer, x, "out", (0, 16, 32, 48, 64)), -1)
    torch.testing.assert_close(parts, x @ layer.dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("side", "cut"), [("out", 128), ("in", 16)])
def test_the_last_shard_may_end_in_padding(side, cut, generator):
    layer = random_layer(24, 200, LayerLayout(codebook="bt2", rank=3, rotation="none"))
    x = torch.randn(3, 24, generator=generator)
    features = {"out": 200, "in": 24}[side]
    found = outputs(layer, x, side, (0, cut, features))
    together = torch.cat(found, -1) if side == "out" else sum(found)
    torch.testing.assert_close(together, x @ layer.dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_stored_tensor_is_cut_or_kept_whole(codebook):
    """The axes that are named have the length of the features; tensors that are kept have none of it."""
    layout = LayerLayout(codebook=codebook, rank=3, factor_bits=8, ft_rank=2, group_size=8, rotation_block=8)
    small, wide, tall = layout.tensors(128, 64), layout.tensors(128, 128), layout.tensors(256, 64)
    for name, tensor in small.items():
        for side, larger in (("out", tall), ("in", wide)):
            axis = layout.shard_axis(name, side)
            if axis is None:
                assert larger[name].shape == tensor.shape
            else:
                assert larger[name].shape[axis] == 2 * tensor.shape[axis]


def test_a_stack_of_experts_is_cut_like_one_matrix():
    layout = LayerLayout(codebook="int4", rank=3, factor_bits=4, group_size=16, rotation_block=16)
    for name, tensor in layout.tensors(32, 64).items():
        one = torch.arange(tensor.bytes // tensor.dtype.itemsize).view(tensor.shape)
        for side, features in (("out", 32), ("in", 64)):
            cut = layout.shard(name, torch.stack([one, one]), side, features, 16, 32)
            assert torch.equal(cut[1], layout.shard(name, one, side, features, 16, 32))


@pytest.mark.parametrize(
    ("layout", "side", "features", "unit"),
    [
        (LayerLayout(codebook="e8p2", rank=0, rotation="none"), "out", 96, 1),
        (LayerLayout(codebook="e8p2", rank=0, rotation="none"), "in", 96, 8),
        (LayerLayout(codebook="e8p2", rank=0), "in", 96, 32),
        (LayerLayout(codebook="bt2", rank=0, rotation_block=64), "out", 11008, 128),
        (LayerLayout(codebook="bt2", rank=0), "out", 11008, 256),
        (LayerLayout(codebook="bt2", rank=0, rotation_block=8), "in", 4096, 16),
        (LayerLayout(codebook="int4", rank=0, group_size=24, rotation_block=16), "in", 96, 48),
        (LayerLayout(codebook="int4", rank=0, group_size=24, rotation_block=16), "out", 96, 16),
    ],
)
def test_units_by_hand(layout, side, features, unit):
    assert layout.shard_unit(side, features) == unit
    book = get_codebook(layout.codebook)
    assert unit % (book.row_block if side == "out" else book.column_block) == 0


@pytest.mark.parametrize(
    ("layout", "side", "features", "start", "stop", "message"),
    [
        (LayerLayout(codebook="bt2", rank=0, rotation="none"), "out", 384, 0, 192, "no multiples of 128"),
        (LayerLayout(codebook="e8p2", rank=0), "out", 11008, 0, 5504, "no multiples of 256"),
        (LayerLayout(codebook="e8p2", rank=0), "out", 96, 0, 64, "rotated in blocks of 32; 64 of them alone .* of 64"),
        (LayerLayout(codebook="e8p2", rank=0), "in", 100, 0, 40, "rotated in blocks of 1; 40 of them alone"),
        (LayerLayout(codebook="int4", rank=0, rotation="none"), "in", 512, 64, 128, "no multiples of 128"),
        (LayerLayout(codebook="e8p2", rank=0), "in", 96, 64, 128, "of 96 in features cannot be 64 to 128"),
    ],
)
def test_a_cut_through_a_block_is_refused(layout, side, features, start, stop, message):
    with pytest.raises(SpecError, match=message):
        layout.check_shard(side, features, start, stop)


def test_the_whole_is_always_a_shard():
    LayerLayout(codebook="bt2", rank=0).check_shard("out", 100, 0, 100)
