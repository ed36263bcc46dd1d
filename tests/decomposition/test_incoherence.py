"""Random block Hadamard rotations: orthogonal, invertible, for any length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lrq.decomposition import RandomHadamard
from hf_lrq.decomposition.gram import weighted_square
from hf_lrq.layout import hadamard_block


@given(n=st.integers(1, 8192), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_rotation_is_exactly_invertible_up_to_rounding_for_any_length(n, seed):
    generator = torch.Generator().manual_seed(seed)
    V = RandomHadamard.sample(n, generator)
    x = torch.randn(3, n, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(V.undo(V.apply(x)), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(V.apply(x).square().sum(1), x.square().sum(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("n", [1, 2, 6, 8, 12, 24, 100, 384, 513, 1536])
def test_rotation_matrix_is_orthogonal(n, generator):
    V = RandomHadamard.sample(n, generator).apply(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(V @ V.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("n", "block"), [(1, 1), (4, 1), (12, 1), (24, 8), (100, 1), (384, 128), (1536, 256), (4096, 256), (8191, 1)]
)
def test_block_is_the_largest_power_of_two_that_divides(n, block):
    assert hadamard_block(n, 256) == block


def test_signs_only_below_the_smallest_block(generator):
    V = RandomHadamard.sample(12, generator)
    x = torch.randn(2, 12, generator=generator)
    assert torch.equal(V.apply(x), x * V.signs)


def test_an_outlier_is_spread_over_its_block(generator):
    x = torch.zeros(1, 512)
    x[0, 17] = 16.0
    y = RandomHadamard.sample(512, generator).apply(x)
    assert y.abs().max() == pytest.approx(1.0)
    assert (y != 0).sum() == 256


def test_loss_is_invariant_under_both_rotations(generator):
    E, X = torch.randn(24, 96, generator=generator).double(), torch.randn(200, 96, generator=generator).double()
    H = X.T @ X / 200
    U, V = RandomHadamard.sample(24, generator), RandomHadamard.sample(96, generator)
    rotated = U.apply(V.apply(E).T).T
    assert weighted_square(rotated, V.rotate_gram(H)) == pytest.approx(weighted_square(E, H), rel=1e-12)
