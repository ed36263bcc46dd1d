"""Low-rank solvers: the closed-form optimum, its oracle, and quantized factors."""

import pytest
import torch

from hf_lrq.decomposition import LPLR, InputGram, WhitenedSVD
from hf_lrq.decomposition.gram import weighted_square
from hf_lrq.decomposition.lowrank import balance, truncated_svd, whitened_factors


@pytest.fixture
def problem(generator):
    A = torch.randn(40, 64, generator=generator)
    mix = torch.randn(64, 64, generator=generator)
    return A, InputGram.from_inputs(torch.randn(1000, 64, generator=generator) @ mix).damped(0.01)


@pytest.mark.parametrize("rank", [1, 7, 40])
def test_loss_of_the_whitened_svd_is_the_tail_of_the_singular_values(problem, generator, rank):
    """Eckart-Young: e^2 = sum of sigma_i^2 for i > r, sigma the singular values of A M."""
    A, gram = problem
    L, R = whitened_factors(A, gram, rank, generator)
    tail = torch.linalg.svdvals(A.double() @ gram.M.double())[rank:].square().sum().item()
    total = weighted_square(A, gram.H)
    assert weighted_square(A - L @ R, gram.H) / total == pytest.approx(tail / total, abs=1e-6)


def test_no_other_factors_of_the_rank_do_better(problem, generator):
    A, gram = problem
    L, R = whitened_factors(A, gram, 5, generator)
    best = weighted_square(A - L @ R, gram.H)
    for _ in range(20):
        dL = 0.02 * torch.randn(L.shape, generator=generator) * L.std()
        dR = 0.02 * torch.randn(R.shape, generator=generator) * R.std()
        assert weighted_square(A - (L + dL) @ (R + dR), gram.H) > best


def test_iterative_svd_agrees_with_the_exact_one(generator):
    spectrum = torch.logspace(0, -6, 600)
    U = torch.linalg.qr(torch.randn(700, 600, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(600, 600, generator=generator)).Q
    A = U * spectrum @ V.T
    _, sigma, Vt = truncated_svd(A, 16, generator)
    torch.testing.assert_close(sigma, spectrum[:16], rtol=2e-3, atol=0)
    assert Vt.shape == (16, 600)


def test_stored_factors_are_float16_and_lose_next_to_nothing(problem, generator):
    A, gram = problem
    stored = WhitenedSVD(8).solve(A, gram, generator)
    L, R = whitened_factors(A, gram, 8, generator)
    assert stored.L.data.dtype == torch.float16
    exact, rounded = weighted_square(A - L @ R, gram.H), weighted_square(A - stored.dense(), gram.H)
    assert rounded == pytest.approx(exact, rel=1e-4)  # float16 has 11 bits: (2^-12)^2 of the energy, far below this


@pytest.mark.parametrize(("bits", "worst"), [(8, 1.002), (4, 1.35)])
def test_low_precision_factors_stay_close_to_float_ones(problem, generator, bits, worst):
    A, gram = problem
    exact = weighted_square(A - WhitenedSVD(8).solve(A, gram, generator).dense(), gram.H)
    low_rank = LPLR(8, bits=bits).solve(A, gram, generator)
    assert exact <= weighted_square(A - low_rank.dense(), gram.H) < worst * exact
    assert low_rank.L.data.dtype == (torch.int8 if bits == 8 else torch.uint8)


def test_alternating_beats_rounding_once(problem, generator):
    A, gram = problem
    once, many = (
        weighted_square(A - LPLR(8, bits=4, iters=iters).solve(A, gram, generator).dense(), gram.H) for iters in (1, 8)
    )
    assert many < once


@pytest.mark.parametrize("solver", [WhitenedSVD(0), LPLR(0, bits=8), LPLR(0, bits=4)])
def test_rank_zero_is_the_zero_product(problem, generator, solver):
    A, gram = problem
    low_rank = solver.solve(A, gram, generator)
    assert low_rank.rank == 0
    assert torch.equal(low_rank.dense(), torch.zeros_like(A))


@pytest.mark.parametrize("solver", [WhitenedSVD(100), LPLR(100, bits=8), LPLR(100, bits=4)])
def test_rank_is_clamped_to_the_matrix(generator, solver):
    gram = InputGram.identity(5).damped(0.01)
    low_rank = solver.solve(torch.randn(3, 5, generator=generator), gram, generator)
    assert low_rank.rank == 3


def test_balancing_keeps_the_product_and_equalises_the_factors(generator):
    L, R = torch.randn(30, 4, generator=generator) * 100, torch.randn(4, 20, generator=generator) * 0.01
    left, right = balance(L, R)
    torch.testing.assert_close(left @ right, L @ R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.square().mean(0), right.square().mean(1), rtol=1e-4, atol=0)
