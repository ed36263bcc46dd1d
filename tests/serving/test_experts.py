"""Experts: stacks are loaded and cut like single matrices, and tokens meet the experts that were chosen for them."""

import pytest
import torch
from torch.nn.functional import silu

from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer
from hf_lrq.serving import Part, Shard, routed_experts

EXPERTS, HIDDEN, INNER = 4, 64, 128
LAYOUT = LayerLayout(codebook="int4", rank=3, factor_bits=8, group_size=32, rotation_block=32)


def gate_times_up(y):
    gate, up = y.chunk(2, -1)
    return silu(gate) * up


@pytest.fixture(scope="module")
def layers():
    """Gate and up in one matrix, and down, of each expert."""
    both = [random_layer(HIDDEN, 2 * INNER, LAYOUT, seed=2 * expert) for expert in range(EXPERTS)]
    return both, [random_layer(INNER, HIDDEN, LAYOUT, seed=2 * expert + 1) for expert in range(EXPERTS)]


def stack(layers, shard):
    part = Part("m.experts.qstack", LAYOUT, shard, experts=len(layers))
    for key in layers[0].stored_tensors():
        part.load(key, torch.stack([layer.stored_tensors()[key] for layer in layers]))
    part.check()
    return part


def dense(x, chosen, weights, both, down):
    out = torch.zeros_like(x)
    for token, (experts, shares) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            if 0 <= expert < EXPERTS:
                between = gate_times_up(x[token] @ both[expert].dense().T)
                out[token] += share * (between @ down[expert].dense().T)
    return out


@pytest.mark.parametrize("chosen", [[[0, 3], [3, 1], [0, 1]], [[2, 2]], [[-1, 2], [4, 0], [1, -1]], [[-1, 4]]])
def test_tokens_meet_their_experts(layers, chosen):
    both, down = layers
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor(chosen)
    x, weights = torch.randn(len(chosen), HIDDEN, generator=generator), torch.rand(chosen.shape, generator=generator)
    whole = [stack(both, Shard.whole(2 * INNER, HIDDEN))]
    found = routed_experts(x, chosen, weights, whole, stack(down, Shard.whole(HIDDEN, INNER)), gate_times_up)
    torch.testing.assert_close(found, dense(x, chosen, weights, both, down), rtol=1e-4, atol=1e-4)


def test_two_processes_add_up(layers):
    """Each holds half of gate, half of up, and the columns of down that go with them."""
    both, down = layers
    generator = torch.Generator().manual_seed(0)
    x, chosen = torch.randn(2, HIDDEN, generator=generator), torch.tensor([[0, 2], [2, 3]])
    weights = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    summands = []
    for start in (0, INNER // 2):
        stop = start + INNER // 2
        halves = [Shard.of_rows(2 * INNER, HIDDEN, at + start, at + stop) for at in (0, INNER)]
        up, back = [stack(both, half) for half in halves], stack(down, Shard.of_columns(HIDDEN, INNER, start, stop))
        summands.append(routed_experts(x, chosen, weights, up, back, gate_times_up))
    torch.testing.assert_close(sum(summands), dense(x, chosen, weights, both, down), rtol=1e-4, atol=1e-4)
