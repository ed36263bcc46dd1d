"""Parts of a layer: what is loaded tensor by tensor computes what the layer does, whole or in shards."""

import pytest
import torch

from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.kernels import linear
from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer
from hf_lrq.serving import Part, PlainPart, Shard, in_one_matrix

OUT, IN = 512, 256
CODEBOOKS = ("bt2", "bt4", "tcq3", "e8p2", "int4", "nf4")


def loaded(layer, shard):
    part = Part("m.q_proj", layer.layout, shard)
    for key, tensor in layer.stored_tensors().items():
        part.load(key, tensor)
    part.check()
    return part


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, IN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_shards_recombine_to_the_whole_layer(codebook, factor_bits, x):
    layout = LayerLayout(codebook=codebook, rank=7, factor_bits=factor_bits, rotation_block=64, ft_rank=2)
    layer = random_layer(IN, OUT, layout)
    whole = linear(x, loaded(layer, Shard.whole(OUT, IN)).operands(), backend="torch")
    torch.testing.assert_close(whole, x @ layer.dense().T, rtol=1e-4, atol=1e-4)
    rows = [loaded(layer, Shard.of_rows(OUT, IN, start, start + 256)) for start in (0, 256)]
    parts = torch.cat([linear(x, part.operands(), backend="torch") for part in rows], -1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    columns = [loaded(layer, Shard.of_columns(OUT, IN, start, start + 128)) for start in (0, 128)]
    summands = [
        linear(x[:, start : start + 128].contiguous(), part.operands(), backend="torch")
        for start, part in zip((0, 128), columns, strict=True)
    ]
    torch.testing.assert_close(sum(summands), whole, rtol=1e-4, atol=1e-4)


def test_rows_of_some_columns_are_a_shard_as_well(x):
    layer = random_layer(IN, OUT, LayerLayout(codebook="e8p2", rank=3, rotation_block=32))
    part = loaded(layer, Shard(OUT, IN, (64, 96), (128, 256)))
    own = x.clone()
    own[:, :128] = 0
    found = linear(own[:, 128:].contiguous(), part.operands(), backend="torch")
    torch.testing.assert_close(found, (own @ layer.dense().T)[:, 64:96], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("codebook", "shard", "message"),
    [
        ("bt2", Shard.of_rows(768, 64, 0, 192), "m.q_proj: out features 0 to 192 of 768 .* fit: 2 of 384, 3 of 256, 6"),
        ("bt2", Shard.of_rows(128, 64, 0, 64), "no multiples of 128.* equal shards that fit: none"),
        ("int4", Shard.of_columns(64, 512, 0, 64), "in features 0 to 64 .* 128.* fit: 2 of 256, 4 of 128"),
        ("e8p2", Shard.of_columns(64, 96, 0, 64), "rotated in blocks of 32; 64 of them alone .* fit: 3 of 32"),
    ],
)
def test_a_shard_that_cuts_a_block_is_refused_with_sizes_that_fit(codebook, shard, message):
    with pytest.raises(SpecError, match=message):
        Part("m.q_proj", LayerLayout(codebook=codebook, rank=0, rotation_block=128), shard)


def test_a_shard_has_all_ranks_of_the_whole():
    layout = LayerLayout(codebook="e8p2", rank=60, rotation_block=16)
    part = Part("m.q_proj", layout, Shard.of_rows(64, 64, 0, 16))
    assert part.lr_L.shape == (16, 60)
    assert part.lr_R.shape == (60, 64)


def test_a_tensor_that_was_not_loaded_is_named():
    layer = random_layer(IN, OUT, LayerLayout(codebook="bt2", rank=2))
    part = Part("m.q_proj", layer.layout, Shard.whole(OUT, IN))
    for key, tensor in layer.stored_tensors().items():
        if key not in ("scales", "lr_R"):
            part.load(key, tensor)
    with pytest.raises(CheckpointError, match=r"lacks m\.q_proj\.lr_R, m\.q_proj\.scales\."):
        part.check()


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("scales", torch.ones(OUT), r"m\.q_proj\.scales: expected torch.float16 \[512\], found torch.float32"),
        ("scales", torch.ones(2, dtype=torch.float16), r"m\.q_proj\.scales: expected .* found torch.float16 \[2\]"),
        ("lr_L", torch.ones(OUT, 2), r"m\.q_proj\.lr_L: expected no such tensor"),
    ],
)
def test_a_tensor_of_another_checkpoint_is_refused(key, tensor, message):
    part = Part("m.q_proj", LayerLayout(codebook="bt2", rank=0), Shard.whole(OUT, IN))
    with pytest.raises(CheckpointError, match=message):
        part.load(key, tensor)


@pytest.mark.parametrize(("key", "what"), [("scales", "finite numbers"), ("rot_in", "signs")])
def test_values_that_cannot_be_are_named(key, what):
    layer = random_layer(IN, OUT, LayerLayout(codebook="bt2", rank=2))
    layer.get_parameter(key).data[3] = torch.nan
    with pytest.raises(CheckpointError, match=rf"m\.q_proj\.{key}: expected {what}"):
        loaded(layer, Shard.whole(OUT, IN))


def test_equal_rotations_become_one_tensor(x):
    layout = LayerLayout(codebook="bt2", rank=2)
    one, other = (loaded(random_layer(IN, OUT, layout), Shard.whole(OUT, IN)) for _ in range(2))
    third = loaded(random_layer(IN, OUT, layout, seed=1), Shard.whole(OUT, IN))
    before = linear(x, other.operands())
    other.share_rotation([third, one])
    third.share_rotation([one])
    assert other.rot_in is one.rot_in
    assert third.rot_in is not one.rot_in
    assert torch.equal(linear(x, other.operands()), before)


def test_an_uncompressed_matrix_is_cut_in_the_same_way():
    W = torch.arange(24.0).view(6, 4)
    part = PlainPart("m.k_proj", Shard(6, 4, (2, 4), (0, 2)), torch.float32)
    with pytest.raises(CheckpointError, match=r"lacks m\.k_proj\.weight"):
        part.check()
    part.load("weight", W)
    part.check()
    assert part.weight.tolist() == [[8, 9], [12, 13]]
    for wrong in (W.int(), W.T):
        with pytest.raises(CheckpointError, match=r"m\.k_proj\.weight: expected floats \[6, 4\]"):
            part.load("weight", wrong)


def test_rows_of_a_table_are_looked_up():
    layer = random_layer(64, 50, LayerLayout(codebook="int8", rank=0, rotation="none", group_size=32))
    at = torch.tensor([[0, 3], [9, 3]])
    for start, stop in ((0, 50), (20, 30)):
        found = loaded(layer, Shard.of_rows(50, 64, start, stop)).look_up(at, torch.float32)
        assert torch.equal(found, layer.dense()[start + at])


def test_one_graph_looks_up_any_number_of_rows():
    """As engines compile a model: for whatever number of tokens a step has."""
    layer = random_layer(64, 50, LayerLayout(codebook="int6", rank=0, rotation="none", group_size=32))
    part, graphs = loaded(layer, Shard.of_rows(50, 64, 20, 30)), []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    look_up = torch.compile(part.look_up, backend=keep, fullgraph=True, dynamic=True)
    for count in (3, 2, 9):
        at = torch.arange(count)
        assert torch.equal(look_up(at, torch.float32), layer.dense()[20 + at])
    assert len(graphs) == 1


def test_matrices_that_are_stored_as_one_are_cut_apart(x):
    """q of 256 rows above k and v of 128, for two processes."""
    layer = random_layer(IN, OUT, LayerLayout(codebook="e8p2", rank=3, rotation_block=32))
    told, heights = x @ layer.dense().T, (256, 128, 128)
    q, k, v = told.split(heights, -1)
    for rank in (0, 1):
        own = [Shard.of_rows(rows, IN, rank * rows // 2, (rank + 1) * rows // 2) for rows in heights]
        found = [linear(x, loaded(layer, shard).operands(), backend="torch") for shard in in_one_matrix(own)]
        expected = [y.chunk(2, -1)[rank] for y in (q, k, v)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_all_of_what_is_stored_as_one_is_one_shard():
    assert in_one_matrix([Shard.whole(rows, IN) for rows in (256, 128)]) == [Shard.whole(384, IN)]
