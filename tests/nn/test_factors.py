"""Growing, replacing and restoring the low-rank part of a layer: exact, and without a hand on Q."""

import pytest
import torch

from hf_lrq.decomposition import compress_matrix
from hf_lrq.factors import concatenated, least_ranks
from hf_lrq.layout import FACTOR_NAMES
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.spec import LayerSpec

PLAIN = {"bits": 4, "rank": 4, "factor_bits": 16, "codebook": "e8p", "iters": 1, "sweeps": 0}
VARIANTS = [{}, {"rank": 0}, {"factor_bits": 8}, {"factor_bits": 4, "rank": 3}, {"rotation": "none"}]


def compressed(shape=(24, 40), **variant):
    generator = torch.Generator().manual_seed(0)
    spec = LayerSpec(**{**PLAIN, **variant})
    return compress_matrix(torch.randn(shape, generator=generator), None, spec, generator)


def make(shape=(24, 40), **variant):
    return LRQLinear.from_matrix(compressed(shape, **variant))


def pair(rank, shape=(24, 40), seed=1, scale=1.0):
    """Values that float16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    L = torch.randn(shape[0], rank, generator=generator) * scale
    R = torch.randn(rank, shape[1], generator=generator) / scale
    return L.half().float(), R.half().float()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_absorbing_adds_the_product_and_leaves_codes_alone(variant):
    layer, untouched = make(**variant), make(**variant)
    L, R = pair(3)
    layer.absorb(L, R)
    expected = untouched.dense() + torch.matmul(*untouched.unrotated(L, R))
    torch.testing.assert_close(layer.dense(), expected, rtol=1e-5, atol=1e-5)
    kept = ["weight", "scales", "rot_in", "rot_out"]
    if layer.layout.factor_bits < 16:
        kept += ["lr_L", "lr_R", "lr_L_scale", "lr_R_scale"]
    for name in kept:
        before, after = getattr(untouched, name), getattr(layer, name)
        assert (before is None and after is None) or torch.equal(before, after), name


@pytest.mark.parametrize(
    ("variant", "ranks"),
    [({}, (7, 0)), ({"rank": 0}, (3, 0)), ({"factor_bits": 8}, (4, 3)), ({"factor_bits": 4}, (4, 3))],
)
def test_float_factors_gain_ranks_and_codes_a_second_pair(variant, ranks):
    layer = make(**variant)
    layer.absorb(*pair(3))
    assert (layer.rank, layer.ft_rank) == ranks
    assert (layer.layout.rank, layer.layout.ft_rank) == ranks
    stored = layer.layout.tensors(24, 40)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in layer.named_parameters()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()
    }
    assert layer.layout.bytes(24, 40) == sum(p.numel() * p.element_size() for p in layer.parameters())
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_rank_zero_base_with_coded_factors_gets_plain_float_factors():
    layer = make(rank=0, factor_bits=8)
    layer.absorb(*pair(3))
    assert (layer.layout.rank, layer.layout.factor_bits, layer.layout.ft_rank) == (3, 16, 0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_absorbing_twice_is_absorbing_the_sum(variant):
    twice, once = make(**variant), make(**variant)
    first, second = pair(2), pair(3, seed=2)
    twice.absorb(*first)
    twice.absorb(*second)
    once.absorb(*concatenated([first, second]))
    assert twice.layout == once.layout
    assert torch.equal(twice.dense(), once.dense())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_forward_agrees_with_the_dense_weight_after_absorbing(variant):
    layer = make(**variant)
    layer.absorb(*pair(3))
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x), x @ layer.dense().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_restore_brings_back_the_very_tensors(variant):
    layer = make(**variant)
    before = {name: getattr(layer, name) for name in FACTOR_NAMES}
    layout, dense, stored = layer.layout, layer.dense(), layer.factors()
    layer.absorb(*pair(3))
    assert not torch.equal(layer.dense(), dense)
    layer.restore(stored)
    assert all(getattr(layer, name) is tensor for name, tensor in before.items())
    assert layer.layout == layout
    assert torch.equal(layer.dense(), dense)


def test_what_float16_holds_is_stored_without_rounding_whatever_its_gauge():
    """L in the subnormals of float16 and R in the hundreds: balanced by powers of two, no digit is lost."""
    L, R = pair(3)
    tiny_L, huge_R = L * 2.0**-20, R * 2.0**20
    layer = make(rank=0)
    layer.replace_factors(tiny_L, huge_R)
    assert torch.equal(torch.matmul(*(factor.float() for factor in layer.low_rank())), L @ R)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 8)])
def test_more_ranks_than_the_matrix_has_are_multiplied_out(shape):
    layer = make(shape)
    before = layer.dense()
    L, R = pair(40, shape, scale=0.1)
    layer.absorb(L, R)
    assert layer.rank == min(shape)
    expected = before + torch.matmul(*layer.unrotated(L, R))
    torch.testing.assert_close(layer.dense(), expected, rtol=2e-3, atol=2e-2)


def test_least_ranks_keeps_what_is_small_enough():
    L, R = pair(3)
    assert least_ranks(L, R) == (L, R)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("factor_bits", [16, 8])
def test_what_float16_cannot_hold_is_refused_and_nothing_changes(bad, factor_bits):
    layer = make(factor_bits=factor_bits)
    dense, layout = layer.dense(), layer.layout
    L, R = pair(2)
    L[0, 0] = bad
    R[0] = R[0] * (1e9 if bad == 1e9 else 1)
    with pytest.raises(FloatingPointError, match=r"NaN, Inf, or values beyond the range of float16 \(65504\)"):
        layer.absorb(L, R)
    assert torch.equal(layer.dense(), dense)
    assert layer.layout == layout


@pytest.mark.parametrize("variant", [{}, {"rotation": "none"}, {"rotation_block": 8}], ids=str)
def test_rotated_and_unrotated_undo_each_other(variant):
    layer = make(**variant)
    L, R = pair(3)
    for there, back in ((layer.rotated, layer.unrotated), (layer.unrotated, layer.rotated)):
        torch.testing.assert_close(back(*there(L, R)), (L, R))


def test_a_pair_for_the_outside_computes_the_same_inside():
    layer = make()
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    L, R = pair(3)
    expected = layer(x) + (x @ R.T) @ L.T
    layer.absorb(*layer.rotated(L, R))
    torch.testing.assert_close(layer(x), expected, rtol=2e-3, atol=2e-2)


def test_nothing_is_moved_behind_trained_rotations():
    layer = make()
    layer.rot_out.data[0] = 0.5
    with pytest.raises(ValueError, match="no longer signs"):
        layer.rotated(*pair(3))


def test_the_layer_can_be_given_other_factors_for_one_call():
    layer = make()
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    seen = []

    def doubled(L, R):
        seen.append((L, R))
        return 2 * L, R

    y = layer(x, adapt=doubled)
    assert torch.equal(seen[0][0], layer.lr_L)
    other = make()
    other.replace_factors(2 * layer.lr_L.float(), layer.lr_R.float())
    assert torch.equal(y, other(x))
    assert torch.equal(layer(x), make()(x))


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_handing_back_the_same_factors_changes_no_bit(factor_bits):
    layer = make(factor_bits=factor_bits)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
        assert torch.equal(layer(x, adapt=lambda L, R: (L.float(), R.float())), layer(x))


def test_an_expert_stack_reads_a_second_pair():
    single = make(factor_bits=8)
    single.absorb(*pair(3))
    stack = LRQExpertStack(2, 40, 24, single.layout)
    for name, tensor in single.named_parameters():
        getattr(stack, name).data.copy_(tensor.expand(2, *tensor.shape))
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(stack(x, 1), single(x))
    assert torch.equal(stack.layer(1).dense(), single.dense())


def test_the_second_pair_is_shown():
    layer = make(factor_bits=8)
    assert "ft_rank" not in repr(layer)
    layer.absorb(*pair(3))
    assert "rank=4, factor_bits=8, ft_rank=3" in repr(layer)
