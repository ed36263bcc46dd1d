"""Stacks of layers: rows sorted by expert meet the layer of their expert, all in one operator."""

import pytest
import torch

from hf_lrq.kernels import Operands, linear, linear_experts, reference
from hf_lrq.kernels.operands import by_field
from hf_lrq.layout import LayerLayout
from hf_lrq.nn.random import random_layer

COLUMNS, ROWS = 40, 24
LAYOUTS = {
    "bt2": LayerLayout(codebook="bt2", rank=3, factor_bits=8),
    "int4": LayerLayout(codebook="int4", rank=5, factor_bits=4, group_size=16),
    "e8p2": LayerLayout(codebook="e8p2", rank=0, rotation="none"),
    "tcq3": LayerLayout(codebook="tcq3", rank=2, factor_bits=16, ft_rank=2),
}
COUNTS = torch.tensor([2, 0, 1, 4])


def layers(layout, seed=0):
    """One for each expert."""
    return [random_layer(COLUMNS, ROWS, layout, seed=seed + expert) for expert in range(len(COUNTS))]


def stack(single):
    tensors = {key: torch.stack([one.stored_tensors()[key] for one in single]) for key in single[0].stored_tensors()}
    return Operands.of_stack(tensors, single[0].layout)


def rows(count=9, dtype=torch.float32):
    return torch.randn(count, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)


def pieces(x, counts=COUNTS):
    """Rows of each expert, and those of none."""
    return x.split([*counts.tolist(), len(x) - int(counts.sum())])


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_each_row_meets_the_layer_of_its_expert(layout, backend):
    single, x = layers(layout), rows()
    (y,) = linear_experts(x, COUNTS, [stack(single)], backend)
    each = [linear(own, one.operands(), backend) for own, one in zip(pieces(x)[:-1], single, strict=True)]
    assert torch.equal(y[: COUNTS.sum()], torch.cat(each))
    assert torch.equal(y[COUNTS.sum() :], torch.zeros(2, ROWS))


def test_many_rows_of_one_expert_are_computed_as_those_of_a_layer():
    single, counts = layers(LAYOUTS["bt2"]), torch.tensor([300, 1, 0, 2])
    x = rows(303)
    (y,) = linear_experts(x, counts, [stack(single)])
    each = [linear(own, one.operands()) for own, one in zip(pieces(x, counts)[:-1], single, strict=True)]
    assert torch.equal(y, torch.cat(each))


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("seed", [0, 7], ids=["equal rotations", "different rotations"])
def test_two_stacks_for_the_same_rows(seed, activation):
    both, x = [layers(LAYOUTS["bt2"]), layers(LAYOUTS["bt2"], seed)], rows(7, torch.bfloat16)
    found = linear_experts(x, COUNTS, [stack(single) for single in both], activation=activation)
    for y, single in zip(found, both, strict=True):
        (alone,) = linear_experts(x, COUNTS, [stack(single)], activation=activation)
        assert torch.equal(y, alone)


def test_a_stack_that_was_written_to_is_read_anew():
    single, x = layers(LAYOUTS["bt2"]), rows()
    held = stack(single)
    linear_experts(x, COUNTS, [held])
    held.scales.mul_(2)
    held = held._replace(weight=held.weight.flip(0).contiguous())
    (y,) = linear_experts(x, COUNTS, [held])
    (told,) = linear_experts(x, COUNTS, [held], "torch")
    torch.testing.assert_close(y, told, rtol=1e-4, atol=1e-4)


def test_biases_are_those_of_the_experts():
    single, x = layers(LAYOUTS["int4"]), rows()
    biases = torch.randn(len(COUNTS), ROWS, generator=torch.Generator().manual_seed(1))
    (y,) = linear_experts(x, COUNTS, [stack(single)._replace(bias=biases)])
    (without,) = linear_experts(x, COUNTS, [stack(single)])
    torch.testing.assert_close(y - without, torch.cat([biases.repeat_interleave(COUNTS, 0), torch.zeros(2, ROWS)]))


def test_no_rows_and_no_expert_with_rows():
    held = stack(layers(LAYOUTS["bt2"]))
    assert linear_experts(rows(0), COUNTS * 0, [held])[0].shape == (0, ROWS)
    assert linear_experts(rows(3), COUNTS * 0, [held])[0].eq(0).all()


def test_gradients_are_those_of_the_single_layers():
    single = layers(LAYOUTS["tcq3"])
    x = rows().requires_grad_(True)
    (y,) = linear_experts(x, COUNTS, [stack(single)])
    (found,) = torch.autograd.grad(y.square().sum(), x)
    each = [linear(own, one.operands()) for own, one in zip(pieces(x)[:-1], single, strict=True)]
    (told,) = torch.autograd.grad(torch.cat(each).square().sum(), x)
    torch.testing.assert_close(found, told)
    assert found[COUNTS.sum() :].eq(0).all()


def test_a_graph_without_gradients_refuses_inputs_that_want_them():
    held, x = stack(layers(LAYOUTS["bt2"])), rows()
    with torch.no_grad():
        arguments = (x, COUNTS, *by_field([held]), *held[9:], "auto", "float")
    with pytest.raises(RuntimeError, match="was captured without gradients"):
        torch.ops.hf_lrq.linear_experts(x.requires_grad_(True), *arguments[1:])


def test_stacks_of_two_forms_are_refused():
    one, other = (stack(layers(LAYOUTS[name])) for name in ("bt2", "int4"))
    with pytest.raises(ValueError, match="one \\(codebook, group size, block\\), got"):
        linear_experts(rows(), COUNTS, [one, other])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_opcheck(layout):
    stacks = [stack(layers(layout, seed)) for seed in (0, 7)]
    arguments = (rows(), COUNTS, *by_field(stacks), *stacks[0][9:], "auto", "float")
    torch.library.opcheck(torch.ops.hf_lrq.linear_experts.default, arguments)


def test_one_layer_of_a_stack_is_that_layer():
    single, x = layers(LAYOUTS["tcq3"]), rows()
    held = stack(single)
    for expert, one in enumerate(single):
        assert torch.equal(reference.lrq_linear(x, held.layer(expert)), reference.lrq_linear(x, one.operands()))
