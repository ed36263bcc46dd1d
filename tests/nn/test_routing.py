"""Tokens through the experts that were chosen for them: sorted, computed, and summed with their weights."""

import pytest
import torch

from hf_lrq.kernels import Operands, linear_experts
from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer
from hf_lrq.nn.routing import routed

EXPERTS = 3
FACTORS = torch.tensor([1.0, 10.0, 100.0])


def times_its_factor(rows, counts):
    """Expert e multiplies by FACTORS[e]; rows of no expert become zeros."""
    factors = FACTORS.repeat_interleave(counts)
    return rows * torch.cat([factors, factors.new_zeros(len(rows) - len(factors))])[:, None]


def test_it_is_the_weighted_sum_over_the_experts_of_each_token():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    chosen, weights = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    found = routed(x, chosen, weights, EXPERTS, times_its_factor)
    assert found.tolist() == [[52.0, 104.0], [105.0, 140.0]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_no_expert_adds_nothing(dtype):
    chosen = torch.tensor([[-1, 2], [3, 0], [7, -5]], dtype=dtype)
    found = routed(torch.ones(3, 2), chosen, torch.ones(3, 2), EXPERTS, times_its_factor)
    assert found.tolist() == [[100.0, 100.0], [1.0, 1.0], [0.0, 0.0]]


def test_no_tokens():
    chosen = torch.zeros(0, 2, dtype=torch.int64)
    assert routed(torch.ones(0, 4), chosen, torch.ones(0, 2), EXPERTS, times_its_factor).shape == (0, 4)


def test_sums_are_of_float32_and_rounded_once():
    x = torch.full((1, 1), 1.0, dtype=torch.bfloat16)
    chosen, weights = torch.tensor([[0, 0, 0]]), torch.tensor([[1.0, 2**-9, 2**-9]])
    found = routed(x, chosen, weights, EXPERTS, lambda rows, _: rows)
    assert found.dtype == torch.bfloat16
    assert found.item() == (torch.tensor(1 + 2**-8)).bfloat16().item()


def test_one_graph_for_any_choice_of_any_number_of_tokens():
    single = [random_layer(16, 8, LayerLayout(codebook="bt2", rank=1), seed=seed) for seed in range(EXPERTS)]
    tensors = {key: torch.stack([one.stored_tensors()[key] for one in single]) for key in single[0].stored_tensors()}
    stack, graphs = Operands.of_stack(tensors, single[0].layout), []

    def run(x, chosen, weights):
        return routed(x, chosen, weights, EXPERTS, lambda rows, counts: linear_experts(rows, counts, [stack])[0])

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(run, backend=keep, fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for tokens in (5, 7, 4):  # Sizes that are equal by chance would be taken for one.
        x, weights = torch.randn(tokens, 16, generator=generator), torch.rand(tokens, 2, generator=generator)
        chosen = torch.randint(-1, EXPERTS, (tokens, 2), generator=generator)
        with torch.no_grad():
            assert torch.equal(compiled(x, chosen, weights), run(x, chosen, weights))
    assert len(graphs) == 1
