"""LRQLinear and expert stacks as modules: state, copies, conversion."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_lrq import kernels
from hf_lrq.decomposition import compress_matrix
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.spec import LayerSpec

SPEC = LayerSpec(bits=2, rank=4, factor_bits=16, codebook="e8p", iters=1, sweeps=0)


def matrix(seed=0, spec=SPEC, shape=(16, 24)):
    generator = torch.Generator().manual_seed(seed)
    return compress_matrix(torch.randn(shape, generator=generator), None, spec, generator)


def test_layer_is_an_nn_linear_with_frozen_parameters_and_no_buffers():
    layer = LRQLinear.from_matrix(matrix(), torch.zeros(16))
    assert isinstance(layer, nn.Linear)
    assert not list(layer.buffers())
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.weight.shape == (16, 3, 2)
    assert not any("lrq" in name for name, _ in layer.named_parameters())


def test_state_dict_round_trip_on_an_empty_layer():
    source = LRQLinear.from_matrix(matrix(), torch.ones(16))
    target = LRQLinear(24, 16, True, SPEC.layout)
    target.load_state_dict(source.state_dict())
    x = torch.ones(2, 24)
    assert torch.equal(source(x), target(x))


def test_dense_is_the_matrix_that_was_compressed():
    compressed = matrix()
    torch.testing.assert_close(LRQLinear.from_matrix(compressed).dense(), compressed.dense())


def test_to_linear_computes_the_same():
    layer = LRQLinear.from_matrix(matrix(), torch.randn(16, generator=torch.Generator().manual_seed(1)))
    plain = layer.to_linear()
    assert type(plain) is nn.Linear
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-4)


def test_copies_are_independent():
    layer = LRQLinear.from_matrix(matrix())
    twin = copy.deepcopy(layer)
    twin.scales.data.zero_()
    assert layer.scales.abs().sum() > 0


def test_a_matrix_of_another_layout_is_refused():
    layer = LRQLinear(24, 16, False, SPEC.layout)
    with pytest.raises(ValueError, match=r"lr_L of the matrix is float \(16, 2\), the layer holds float \(16, 4\)"):
        layer.load_matrix(matrix(spec=replace(SPEC, rank=2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lr_L of the matrix is absent, the layer holds float"),
        ({"factor_bits": 8}, "lr_L of the matrix is torch.int8"),
        ({"codebook": "lloyd"}, "codebook of the matrix is 'lloyd2', of the layer 'e8p2'"),
        ({"rotation": "none"}, "rot_in of the matrix is absent"),
        ({"rotation_block": 8}, "rotation_block of the matrix is 8, of the layer 256"),
    ],
)
def test_a_matrix_that_would_be_misread_is_refused_and_nothing_is_copied(changes, message):
    other = matrix(1, replace(SPEC, **changes))
    layer, stack = LRQLinear.from_matrix(matrix()), LRQExpertStack(2, 24, 16, SPEC.layout)
    stack.load_matrix(1, matrix())
    before = layer.dense()
    with pytest.raises(ValueError, match=message):
        layer.load_matrix(other)
    with pytest.raises(ValueError, match=message):
        stack.load_matrix(1, other)
    assert torch.equal(layer.dense(), before)
    assert torch.equal(stack.layer(1).dense(), before)


def test_rank_counts_ranks_not_bytes():
    for factor_bits in (16, 8, 4):
        spec = LayerSpec(bits=2, rank=5, codebook="e8p", factor_bits=factor_bits, iters=1, sweeps=0)
        assert LRQLinear.from_matrix(matrix(spec=spec)).rank == 5
    assert LRQLinear(24, 16, False, LayerSpec(rank=0).layout).rank == 0


def test_an_expert_stack_is_its_experts():
    stack = LRQExpertStack(3, 24, 16, SPEC.layout)
    matrices = [matrix(seed) for seed in range(3)]
    for expert, compressed in enumerate(matrices):
        stack.load_matrix(expert, compressed)
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(9))
    for expert, compressed in enumerate(matrices):
        assert torch.equal(stack(x, expert), LRQLinear.from_matrix(compressed)(x))
    torch.testing.assert_close(stack.dense(), torch.stack([compressed.dense() for compressed in matrices]))


def test_tokens_that_are_sorted_meet_their_experts_and_the_biases_of_those():
    stack = LRQExpertStack(3, 24, 16, SPEC.layout)
    for expert in range(3):
        stack.load_matrix(expert, matrix(expert))
    generator = torch.Generator().manual_seed(9)
    x, biases = torch.randn(6, 24, generator=generator), torch.randn(3, 16, generator=generator)
    found = stack(x, torch.tensor([2, 0, 3]), biases)
    expected = [stack(x[:2], 0) + biases[0], stack(x[2:5], 2) + biases[2], torch.zeros(1, 16)]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("kind", ["layer", "one expert", "experts"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_in_training_inputs_are_never_rounded(monkeypatch, kind, reentrant):
    """Checkpointing computes twice: first without gradients, if it is reentrant. Both passes must be the same."""
    seen = []
    module, function, arguments = {
        "layer": ("linear", "linear", ()),
        "one expert": ("experts", "linear", (0,)),
        "experts": ("experts", "linear_experts", (torch.tensor([2]),)),
    }[kind]
    original = getattr(kernels, function)

    def spy(x, *arguments):
        seen.append(arguments[-1])
        return original(x, *arguments)

    monkeypatch.setattr(f"hf_lrq.nn.{module}.{function}", spy)
    if kind == "layer":
        layer = LRQLinear.from_matrix(matrix())
    else:
        layer = LRQExpertStack(1, 24, 16, SPEC.layout)
        layer.load_matrix(0, matrix())
    layer.activation = "int8"
    x = torch.ones(2, 24, requires_grad=True)
    with torch.no_grad():
        layer(x, *arguments)
    assert seen == ["int8"]
    layer.train()
    checkpoint(layer, x, *arguments, use_reentrant=reentrant).sum().backward()
    assert seen == ["int8", "float", "float"]
    with torch.no_grad():
        layer.eval()(x, *arguments)
    assert seen[-1] == "int8"
