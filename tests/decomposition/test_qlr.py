"""The alternating loop and `compress_matrix`: what each ingredient buys, determinism, errors."""

import dataclasses

import pytest
import torch

from hf_lrq.decomposition import InputGram, RandomHadamard, compress_matrix, proxy_loss
from hf_lrq.decomposition.compress_matrix import generator_for, input_rotation
from hf_lrq.errors import CompressionError
from hf_lrq.spec import LayerSpec

SPEC = LayerSpec(bits=2, rank=8, factor_bits=16, codebook="e8p")


def problem(seed=0, out_features=96, in_features=128, tokens=2000):
    """A weight with a decaying spectrum and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out_features, in_features, generator=generator)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    W = U * torch.linspace(3, 0.3, len(S)).square() @ V
    basis = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator)).Q
    x = torch.randn(tokens, in_features, generator=generator) * torch.logspace(0, -1.5, in_features) @ basis.T
    return W, InputGram.from_inputs(x)


def loss(spec, seed=0, gram=True):
    W, H = problem(seed)
    compressed = compress_matrix(W, H if gram else None, spec, torch.Generator().manual_seed(seed))
    return proxy_loss(W, compressed.dense(), H.damped(spec.damp_percent).H)


def mean_loss(spec, **kwargs):
    return sum(loss(spec, seed, **kwargs) for seed in range(3)) / 3


def change(**kwargs):
    return dataclasses.replace(SPEC, **kwargs)


def test_reported_loss_is_the_loss_of_the_dense_weight_in_the_original_basis():
    W, gram = problem()
    for spec in (SPEC, change(factor_bits=8), change(factor_bits=4), change(rank=0), change(rotation="none")):
        compressed = compress_matrix(W, gram, spec, torch.Generator().manual_seed(0))
        measured = proxy_loss(W, compressed.dense(), gram.damped(spec.damp_percent).H)
        assert compressed.proxy_loss == pytest.approx(measured, rel=1e-3)
        assert compressed.proxy_loss == min(compressed.trace)


def test_each_ingredient_lowers_the_loss():
    full = mean_loss(SPEC)
    assert full < mean_loss(change(rank=0))
    assert mean_loss(change(rank=16)) < full
    assert full < mean_loss(change(rounding="nearest"))
    assert full < mean_loss(SPEC, gram=False)
    assert mean_loss(change(refinements=0)) < mean_loss(change(refinements=0, sweeps=0))
    assert mean_loss(change(bits=3)) < full
    assert mean_loss(change(bits=4)) < mean_loss(change(bits=3))


def test_eight_bit_factors_cost_next_to_nothing():
    assert mean_loss(change(factor_bits=8)) < 1.03 * mean_loss(SPEC)


def test_four_bit_factors_beat_no_factors():
    assert mean_loss(change(factor_bits=4)) < mean_loss(change(rank=0))


def test_rank_beats_no_rank_at_equal_bytes():
    """Rank 8 in 16 bits on 96 x 128 costs 2.33 bits a weight, so it has to beat Q alone at more bits than it has."""
    with_rank = change(rank=2, factor_bits=8)
    assert with_rank.bits_per_weight((96, 128)) < change(rank=0, bits=3).bits_per_weight((96, 128))
    assert mean_loss(with_rank) < mean_loss(change(rank=0))


def test_same_seed_same_bytes_and_another_seed_other_bytes():
    W, gram = problem()
    first, second, other = (
        compress_matrix(W, gram, SPEC, torch.Generator().manual_seed(seed)).tensors() for seed in (5, 5, 6)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["weight"], other["weight"])


@pytest.mark.parametrize("factor_bits", [16, 8])
def test_the_number_of_threads_does_not_matter(factor_bits):
    # Large enough that products and factorisations are shared between threads where they may be.
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(300, 384, generator=generator)
    gram = InputGram.from_inputs(torch.randn(1000, 384, generator=generator) * torch.logspace(0, -1.5, 384))
    spec = change(rank=32, factor_bits=factor_bits, iters=1, refinements=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compress_matrix(W, gram, spec, torch.Generator().manual_seed(1)).tensors())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_autocast_of_the_caller_does_not_reach_the_decomposition():
    W, gram = problem()
    spec = change(factor_bits=8, iters=1, refinements=1)
    plain = compress_matrix(W, gram, spec, torch.Generator().manual_seed(0)).tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = compress_matrix(W, gram, spec, torch.Generator().manual_seed(0)).tensors()
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("W", [torch.ones(32, 64), torch.linspace(-1, 1, 64).expand(32, 64)], ids=["ones", "one row"])
def test_more_ranks_than_the_weight_has(W, factor_bits):
    """The factors that are not needed hold rounding errors; their Gram is singular."""
    compressed = compress_matrix(W, None, change(rank=32, factor_bits=factor_bits), torch.Generator().manual_seed(0))
    assert compressed.proxy_loss < 2e-3
    assert all(torch.isfinite(tensor.float()).all() for tensor in compressed.tensors().values())


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (300, 1), (1, 300)])
@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_one_row_or_one_column(shape, factor_bits):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    compressed = compress_matrix(W, None, change(factor_bits=factor_bits), torch.Generator().manual_seed(0))
    assert compressed.dense().shape == shape
    assert compressed.proxy_loss < 5e-3  # One rank is all there is; 4 bits leave (1/15)^2 or so.


def test_global_rng_is_left_alone():
    W, gram = problem()
    before = torch.get_rng_state()
    compress_matrix(W, gram, change(factor_bits=8), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
@pytest.mark.parametrize("shape", [(1, 8), (3, 20), (33, 65), (64, 7), (96, 128)])
def test_stored_tensors_are_those_of_the_layout(factor_bits, shape):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator)
    gram = InputGram.from_inputs(torch.randn(300, shape[1], generator=generator))
    for codebook, bits in (("e8p", 2), ("e8p", 4), ("int", 3), ("lloyd", 2)):
        spec = LayerSpec(bits=bits, codebook=codebook, rank=5, factor_bits=factor_bits, iters=1, sweeps=0)
        compressed = compress_matrix(W, gram, spec, generator)
        layout = spec.layout.tensors(*shape)
        stored = compressed.tensors()
        assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == {
            n: (t.shape, t.dtype) for n, t in layout.items()
        }
        size = sum(t.numel() * t.element_size() for t in stored.values())
        assert size == spec.layout.bytes(*shape)
        assert compressed.bits_per_weight == pytest.approx(8 * size / W.numel())


def test_full_rank_factors_reproduce_the_weight():
    W, gram = problem(out_features=16, in_features=24)
    compressed = compress_matrix(W, gram, change(rank=16), torch.Generator().manual_seed(0))
    assert compressed.proxy_loss < 1e-6


def test_a_rank_that_is_left_open_follows_the_shape():
    W, gram = problem(out_features=96, in_features=64)
    compressed = compress_matrix(W, gram, change(rank=None, factor_bits=8), torch.Generator().manual_seed(0))
    assert compressed.layout.rank == LayerSpec().fitted((96, 64)).rank == 1
    assert compressed.tensors()["lr_L"].shape == (96, 1)


def test_an_all_zero_weight_stays_zero():
    compressed = compress_matrix(torch.zeros(16, 24), None, SPEC, torch.Generator().manual_seed(0))
    assert compressed.proxy_loss == 0
    assert torch.equal(compressed.dense(), torch.zeros(16, 24))


@pytest.mark.parametrize(
    ("W", "message"),
    [
        (torch.full((8, 8), float("nan")), "64 values that are NaN or Inf"),
        (torch.zeros(8), r"shape \[out, in\]"),
        (torch.zeros(0, 8), r"shape \[out, in\]"),
        (torch.full((8, 8), 1e-9), "root mean square of 1e-09"),
        (torch.full((8, 8), 1e-25), "root mean square of 0"),
    ],
)
def test_impossible_weights_are_refused(W, message):
    with pytest.raises(CompressionError, match=message):
        compress_matrix(W, None, SPEC, torch.Generator().manual_seed(0))


def test_a_gram_of_another_layer_is_refused():
    _, gram = problem()
    with pytest.raises(CompressionError, match="128 inputs, the weight has 64 columns"):
        compress_matrix(torch.ones(8, 64), gram, SPEC, torch.Generator().manual_seed(0))


def test_siblings_share_the_input_rotation_and_nobody_else_does():
    q = input_rotation(0, "model.layers.0.self_attn.q_proj", 64, SPEC)
    k = input_rotation(0, "model.layers.0.self_attn.k_proj", 64, SPEC)
    other = input_rotation(0, "model.layers.1.self_attn.q_proj", 64, SPEC)
    assert isinstance(q, RandomHadamard)
    assert torch.equal(q.signs, k.signs)
    assert not torch.equal(q.signs, other.signs)
    assert input_rotation(0, "a.b", 64, change(rotation="none")) is None


def test_generators_depend_on_seed_and_name_only():
    draw = lambda seed, name: torch.rand(4, generator=generator_for(seed, name))  # noqa: E731
    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
