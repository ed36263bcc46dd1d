"""Stored factors: exact packing, least-squares scales, odd ranks."""

import pytest
import torch

from hf_lrq.matrices import dense_factor, expand_scales, quantize_factor


@pytest.mark.parametrize("rank_dim", [0, 1])
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
@pytest.mark.parametrize(("bits", "worst"), [(16, 1e-6), (8, 1e-4), (4, 2e-2)])
def test_factor_round_trip_error(generator, rank_dim, rank, bits, worst):
    """Squared error over energy for Gaussian entries: float16 2^-24 or so, 8 bits under 1e-4, 4 bits under 0.02."""
    values = torch.randn(rank, 300, generator=generator) * torch.logspace(2, -2, rank)[:, None]
    values = values if rank_dim == 0 else values.T
    stored = quantize_factor(values, bits, rank_dim)
    dense = stored.dense()
    assert dense.shape == values.shape
    axis = 1 - rank_dim
    error = (dense - values).square().sum(axis) / values.square().sum(axis)
    assert (error < worst).all()
    assert torch.equal(dense_factor(stored.data, stored.scale, rank_dim).float(), dense)


def test_integer_values_survive_exactly():
    values = torch.tensor([[7.0, -7.0, 3.0, 0.0], [14.0, -2.0, 0.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    for rank_dim, given in ((0, values), (1, values.T)):
        assert torch.equal(quantize_factor(given, 4, rank_dim).dense(), given)


def test_four_bit_codes_take_half_a_byte():
    stored = quantize_factor(torch.randn(5, 12), 4, rank_dim=0)
    assert stored.data.shape == (3, 12)
    assert stored.data.dtype == torch.uint8


def test_scales_expand_to_rows_and_groups():
    assert expand_scales(torch.tensor([1.0, 2.0]), 8, 12).shape == (2, 1)
    grouped = expand_scales(torch.tensor([[1.0, 2.0]]), 8, 12)
    assert grouped.tolist() == [[1.0] * 8 + [2.0] * 4]
