"""Rounding: the LDLQ identity, its advantage over nearest rounding, and monotone sweeps."""

import itertools

import pytest
import torch

from hf_lrq.decomposition import LDLQ, InputGram, RoundToNearest, quantizers
from hf_lrq.decomposition.gram import weighted_square
from hf_lrq.decomposition.quantizers import refit_scales, unit_upper
from hf_lrq.errors import CompressionError

BOOKS = ["e8p2", "e8p3", "e8p4", "int2", "int4", "int8", "lloyd2", "lloyd3", "nf4"]


@pytest.fixture
def problem(generator):
    """A weight and a Gram with a decaying spectrum, as real layers have."""
    W = torch.randn(48, 80, generator=generator)
    basis = torch.linalg.qr(torch.randn(80, 80, generator=generator)).Q
    x = torch.randn(2000, 80, generator=generator) * torch.linspace(1, 0.05, 80) @ basis.T
    return W, InputGram.from_inputs(x).damped(0.01).H


@pytest.mark.parametrize("block", [1, 8])
def test_unit_upper_is_a_block_ldl_factorisation(problem, block):
    _, H = problem
    H = H.double()
    U = unit_upper(H, block)
    D = torch.linalg.solve_triangular(U, torch.linalg.solve_triangular(U, H, upper=True).T, upper=True).T
    outside = torch.ones(80, 80, dtype=torch.bool)
    for k in range(0, 80, block):
        own = slice(k, k + block)
        outside[own, own] = False
        torch.testing.assert_close(U[own, own], torch.eye(block, dtype=H.dtype), rtol=0, atol=1e-12)
        assert not U[k + block :, own].any()
    assert D[outside].abs().max() < 1e-10


@pytest.mark.parametrize("block", [1, 8])
def test_a_gram_that_rounding_made_indefinite_still_guides_the_rounding(problem, block):
    _, H = problem
    H = H - 1.001 * torch.linalg.eigvalsh(H).min() * torch.eye(80)
    assert torch.linalg.cholesky_ex(H).info.item() > 0
    ridge = 1e-3 * H.diagonal().mean() * torch.eye(80)
    torch.testing.assert_close(unit_upper(H, block), unit_upper(H + ridge, block))
    assert torch.isfinite(LDLQ("e8p2", sweeps=1).quantize(torch.ones(3, 80), H).dequantize()).all()


@pytest.mark.parametrize("codebook", BOOKS)
def test_ldlq_beats_nearest_rounding_under_a_correlated_gram(problem, codebook):
    W, H = problem
    nearest = weighted_square(W - RoundToNearest(codebook).quantize(W, H).dequantize(), H)
    adaptive = weighted_square(W - LDLQ(codebook).quantize(W, H).dequantize(), H)
    assert adaptive < 0.9 * nearest


@pytest.mark.parametrize("codebook", ["e8p2", "int2"])
def test_ldlq_is_nearest_rounding_when_inputs_are_uncorrelated(problem, codebook):
    W, _ = problem
    H = torch.diag(torch.linspace(0.5, 2, 80))
    adaptive, nearest = LDLQ(codebook).quantize(W, H), RoundToNearest(codebook).quantize(W, H)
    assert torch.equal(adaptive.packed, nearest.packed)
    assert torch.equal(adaptive.scales, nearest.scales)


def test_feedback_error_times_u_is_the_rounding_error_of_each_block(problem):
    """The LDLQ identity: (W - Q) U has the error that each block's own rounding made."""
    W, H = problem
    Q = LDLQ("int2", group_size=80).quantize(W, H)
    scale = Q.scales.float()
    own_error = ((W - Q.dequantize()) @ unit_upper(H, 1)) / scale
    # A value inside the grid is at most half a step away from its code; int2 has a step of 0.9957.
    target = W / scale + (own_error - (W - Q.dequantize()) / scale)
    inside = target.abs() < 2 * 0.9957
    assert own_error[inside].abs().max() <= 0.9957 / 2 + 1e-4
    assert inside.float().mean() > 0.9


@pytest.mark.parametrize("codebook", ["e8p2", "int2", "lloyd3"])
def test_a_guarded_sweep_never_raises_the_loss(problem, codebook):
    W, H = problem
    losses = [weighted_square(W - LDLQ(codebook, sweeps=sweeps).quantize(W, H).dequantize(), H) for sweeps in range(4)]
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-3)  # float16 storage of the refitted scales may cost up to 2^-11
    assert losses[-1] < losses[0] * 0.99


@pytest.mark.parametrize("codebook", ["e8p2", "int2"])
def test_panels_are_a_matter_of_speed_only(problem, codebook, monkeypatch):
    W, H = problem
    whole = [LDLQ(codebook, sweeps=sweeps).quantize(W, H).dequantize() for sweeps in (0, 2)]
    monkeypatch.setattr(quantizers, "PANEL", 24)
    for sweeps, expected in zip((0, 2), whole, strict=True):
        found = LDLQ(codebook, sweeps=sweeps).quantize(W, H).dequantize()
        # Sums in another order may decide a few ties differently.
        assert (found != expected).float().mean() < 0.02


def test_refitted_scales_are_the_least_squares_ones(problem):
    W, H = problem
    Q = RoundToNearest("e8p2").quantize(W, H)
    _, stretch = refit_scales(W, Q.dequantize(), Q.dequantize() @ H, Q.scales.float())
    values = Q.dequantize() * stretch
    best = weighted_square(W - values, H)
    for factor in (0.99, 1.01):
        assert weighted_square(W - values * factor, H) > best


@pytest.mark.parametrize("codebook", BOOKS)
@pytest.mark.parametrize("shape", [(1, 8), (3, 5), (16, 129), (7, 300), (1, 1)])
def test_any_shape_is_quantized(codebook, shape, generator):
    W = torch.randn(shape, generator=generator)
    H = InputGram.from_inputs(torch.randn(400, shape[1], generator=generator)).damped(0.01).H
    for quantizer in (RoundToNearest(codebook), LDLQ(codebook, sweeps=1)):
        Q = quantizer.quantize(W, H)
        assert Q.dequantize().shape == shape
        assert torch.isfinite(Q.dequantize()).all()
        assert Q.scales.dtype == torch.float16


def test_zero_rows_come_back_as_zero(problem):
    _, H = problem
    W = torch.zeros(4, 80)
    W[1] = 1.0
    for quantizer in (RoundToNearest("e8p2"), LDLQ("e8p2", sweeps=1), LDLQ("int4")):
        Q = quantizer.quantize(W, H).dequantize()
        assert torch.equal(Q[0], torch.zeros(80))
        assert (Q[1].mean() - 1).abs() < 0.3  # the nearest points to all ones are at 3/4 and 5/4 over 1.03


def test_the_weight_that_is_handed_in_is_not_changed(problem):
    W, H = problem
    before = W.clone(), H.clone()
    LDLQ("e8p2", sweeps=1).quantize(W, H)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_a_row_beyond_float16_scales_is_refused():
    W = torch.ones(4, 8)
    W[2] = 1e6
    with pytest.raises(CompressionError, match="needs a scale of 1e\\+06"):
        RoundToNearest("e8p2").quantize(W, torch.eye(8))
