"""Matrices that serving engines spread over processes: sizes that are possible, and plans that make one possible."""

import pytest
import torch
from torch import nn

from hf_lrq.errors import SpecError
from hf_lrq.kernels import has_backend
from hf_lrq.layout import LayerLayout
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import make_plan
from hf_lrq.work.budget import Budget
from hf_lrq.work.cuts import common_counts, shard_counts


def layout(codebook="e8p2", **changes):
    return LayerLayout(codebook=codebook, rank=0, **changes)


@pytest.mark.parametrize(
    ("name", "how", "shape", "counts"),
    [
        ("layers.0.mlp.up_proj", layout("bt2"), (14336, 4096), (1, 2, 4, 7, 8, 14, 28, 56)),
        ("layers.0.mlp.down_proj", layout("bt2"), (4096, 11008), (1, 43)),
        ("layers.0.mlp.down_proj", layout("bt2", rotation_block=128), (4096, 11008), (1, 2, 43)),
        ("layers.0.mlp.down_proj", layout("int4", rotation_block=128), (4096, 11008), (1, 2, 43)),
        ("layers.0.self_attn.k_proj", layout("bt2"), (1024, 4096), (1, 2, 4)),
        ("layers.0.self_attn.k_proj", layout("bt2", rotation_block=128), (1024, 4096), (1, 2, 4, 8)),
        ("layers.0.mlp.gate_up_proj", layout("bt2"), (2048, 512), (1, 2, 4)),
        ("layers.0.mlp.experts.qstack_gate_up_proj", layout("bt2"), (2048, 512), (1, 2, 4)),
        ("layers.0.self_attn.qkv_proj", layout(rotation="none"), (768, 512), (1,)),
        ("layers.0.odd", layout("e8p2", rotation_block=16), (32, 64), (1, 2)),
        ("layers.0.o_proj", layout(), (100, 36), (1,)),
    ],
)
def test_counts_by_hand(name, how, shape, counts):
    assert shard_counts(name, how, *shape) == counts


def test_every_count_is_one_that_the_format_can_cut():
    for codebook in ("bt2", "e8p2", "int4"):
        how = layout(codebook, rotation_block=64, group_size=32)
        for name, side, features in (("a.up_proj", "out", 1536), ("a.down_proj", "in", 1536)):
            shape = (features, 512) if side == "out" else (512, features)
            for count in shard_counts(name, how, *shape):
                for rank in range(count):
                    own = features // count
                    how.check_shard(side, features, rank * own, (rank + 1) * own)


def test_common_counts():
    assert common_counts([(1, 2, 4), (1, 4, 8)]) == (1, 4)
    assert common_counts([]) == ()


class Block(nn.Module):
    """Named like a decoder block; shapes as odd as those of real models."""

    def __init__(self, hidden=576, rows=192, inner=1408):
        super().__init__()
        with torch.device("meta"):
            for name in ("q_proj", "k_proj", "v_proj"):
                self.add_module(name, nn.Linear(hidden, hidden if name == "q_proj" else rows, bias=False))
            self.up_proj = nn.Linear(hidden, inner, bias=False)
            self.down_proj = nn.Linear(inner, hidden, bias=False)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_plan_for_several_processes_can_be_cut(processes):
    spec = CompressionSpec(default=LayerSpec(rank=4), tensor_parallel=processes)
    model = Block(inner=1536)
    for site, chosen in make_plan(model, spec).specs.items():
        counts = shard_counts(site.label, chosen.layout, site.out_features, site.in_features)
        assert processes in counts, (site.label, chosen)


def test_blocks_are_no_smaller_than_they_must_be():
    default = LayerSpec(rank=4, codebook="e8p")
    plans = [make_plan(Block(), CompressionSpec(default=default, tensor_parallel=count)) for count in (1, 2, 4)]
    blocks = [{site.label: spec.rotation_block for site, spec in plan.specs.items()} for plan in plans]
    assert set(blocks[0].values()) == {256}
    # 192 = 64 * 3 rows; 1408 = 128 * 11 features in the middle.
    assert blocks[1] == {"q_proj": 32, "k_proj": 32, "v_proj": 32, "up_proj": 64, "down_proj": 64}
    assert blocks[2] == {"q_proj": 16, "k_proj": 16, "v_proj": 16, "up_proj": 32, "down_proj": 32}


def test_a_codebook_that_was_asked_for_is_not_exchanged():
    spec = CompressionSpec(default=LayerSpec(rank=4, codebook="tcq", bits=3), tensor_parallel=2)
    message = r"tensor_parallel=2: q_proj \[576, 576\] cannot be spread .* codebook 'tcq' of 3 bits .* possible are 1"
    with pytest.raises(SpecError, match=message):
        make_plan(Block(), spec)


def test_a_budget_offers_only_what_can_be_cut():
    spec = CompressionSpec(default=LayerSpec(), tensor_parallel=2)
    model = Block(inner=1536)
    menus = Budget(10**9, spec).menus(make_plan(model, spec), blocks=has_backend(torch.device("cpu")))
    offered = [(site, each) for menu in menus for site in menu.sites for each in menu.specs]
    assert len(offered) > 20
    for site, each in offered:
        assert 2 in shard_counts(site.label, each.layout, site.out_features, site.in_features)
