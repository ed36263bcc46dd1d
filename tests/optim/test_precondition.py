"""The preconditioner as a function."""

import pytest
import torch

from hf_lrq.optim import precondition
from hf_lrq.optim.precondition import Whitening, inverse_root, left_gram, right_gram


def draw(generator, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.fixture
def factors(generator):
    """grad_L, grad_R, L, R of a 7 x 9 matrix of rank 3."""
    return tuple(draw(generator, *shape) for shape in ((7, 3), (3, 9), (7, 3), (3, 9)))


@pytest.mark.parametrize("damping", [1e-9, 1e-3, 10.0])
@pytest.mark.parametrize("scaling", [1.0, 0.25, -2.0])
def test_gradients_are_divided_by_the_damped_grams_of_the_scaled_factors(factors, damping, scaling):
    grad_L, grad_R, L, R = factors
    new_L, new_R = precondition(*factors, damping=damping, scaling=scaling)
    G_L, G_R = scaling**2 * L.T @ L, scaling**2 * R @ R.T
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(new_L, grad_L @ torch.linalg.inv(G_R + damping * G_R.trace() / 3 * eye))
    torch.testing.assert_close(new_R, torch.linalg.inv(G_L + damping * G_L.trace() / 3 * eye) @ grad_R)


def test_leading_dimensions_are_independent_products(generator):
    stacked = [draw(generator, 2, 5, *shape) for shape in ((7, 3), (3, 9), (7, 3), (3, 9))]
    together = precondition(*stacked)
    for i in range(2):
        for j in range(5):
            alone = precondition(*(x[i, j] for x in stacked))
            torch.testing.assert_close(tuple(x[i, j] for x in together), alone)


def test_the_step_on_the_product_does_not_depend_on_the_split(factors, generator):
    """(L, R) -> (L A, A^-1 R) turns the gradients into grad_L A^-T and A^T grad_R, and leaves dL R + L dR alone."""
    grad_L, grad_R, L, R = factors
    A = draw(generator, 3, 3)
    other_L, other_R = L @ A, torch.linalg.solve(A, R)
    d_L, d_R = precondition(grad_L, grad_R, L, R, 1e-14)
    e_L, e_R = precondition(grad_L @ torch.linalg.inv(A).T, A.T @ grad_R, other_L, other_R, 1e-14)
    torch.testing.assert_close(e_L @ other_R + other_L @ e_R, d_L @ R + L @ d_R, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_rescaling_the_factors_leaves_the_step_alone_even_with_damping(factors, c):
    grad_L, grad_R, L, R = factors
    d_L, d_R = precondition(grad_L, grad_R, L, R, 0.1)
    e_L, e_R = precondition(grad_L / c, grad_R * c, L * c, R / c, 0.1)
    torch.testing.assert_close((e_L / c, e_R * c), (d_L, d_R))


def test_the_step_on_the_weight_does_not_depend_on_the_scaling(factors):
    """W = s L R with L and R rescaled so that W stays: s (dL R + L dR) stays too."""
    grad_L, grad_R, L, R = factors
    d_L, d_R = precondition(grad_L, grad_R, L, R)
    # s L R' with R' = R / s has gradients s grad_L' ... : dLoss/dL = grad_L, dLoss/dR' = s grad_R.
    e_L, e_R = precondition(grad_L, 4.0 * grad_R, L, R / 4.0, scaling=4.0)
    torch.testing.assert_close(4.0 * (e_L @ (R / 4.0) + L @ e_R), d_L @ R + L @ d_R)


def test_whitening_undoes_itself_and_its_norm_ignores_the_split(factors, generator):
    grad_L, _, _, R = factors
    whitening = Whitening(inverse_root(right_gram(R), 1e-12), left=True)
    white = whitening.whiten(grad_L)
    torch.testing.assert_close(whitening.unwhiten(white), whitening.precondition(grad_L))
    A = draw(generator, 3, 3)
    other = Whitening(inverse_root(right_gram(torch.linalg.solve(A, R)), 1e-12), left=True)
    torch.testing.assert_close(other.whiten(grad_L @ torch.linalg.inv(A).T).norm(), white.norm())


def test_whitened_gradients_are_the_same_for_every_rescaling_of_single_ranks(factors):
    grad_L, _, _, R = factors
    scales = torch.tensor([1e-3, 1.0, 40.0], dtype=torch.float64)
    plain = Whitening(inverse_root(right_gram(R), 1e-14), left=True).whiten(grad_L)
    # R -> D^-1 R, L -> L D, grad_L -> grad_L D^-1.
    rescaled = Whitening(inverse_root(right_gram(R / scales[:, None]), 1e-14), left=True).whiten(grad_L / scales)
    torch.testing.assert_close(rescaled, plain, rtol=1e-6, atol=1e-6)


def test_a_zero_factor_leaves_the_gradient_of_the_other_alone(generator):
    grad_L, grad_R, R = (draw(generator, *shape) for shape in ((7, 3), (3, 9), (3, 9)))
    _, new_R = precondition(grad_L, grad_R, torch.zeros(7, 3, dtype=torch.float64), R)
    torch.testing.assert_close(new_R, grad_R)


@pytest.mark.parametrize("rank", [1, 16])
def test_rank_deficient_float32_factors_are_damped_until_they_can_be_factorized(generator, rank):
    """Rounding leaves such a Gram with eigenvalues below -1e-6 of its mean; a plain Cholesky fails."""
    L = draw(generator, 4096, rank, dtype=torch.float32) @ draw(generator, rank, 64, dtype=torch.float32)
    gram = left_gram(L)
    assert torch.linalg.cholesky_ex(gram)[1] > 0
    K = inverse_root(torch.stack((gram, torch.eye(64))), 1e-8)
    assert K.isfinite().all()
    # The healthy neighbour in the batch keeps its own damping.
    torch.testing.assert_close(K[1], torch.eye(64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_gradient_and_float32_accuracy(factors, dtype):
    given = [x.to(dtype) for x in factors]
    exact = precondition(*(x.double() for x in given))
    result = precondition(*given)
    assert [x.dtype for x in result] == [dtype, dtype]
    for x, y in zip(result, exact, strict=True):
        torch.testing.assert_close(x.double(), y.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_factors_that_are_not_finite_are_refused(factors):
    grad_L, grad_R, L, R = factors
    L[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="Gram of a factor is not finite"):
        precondition(grad_L, grad_R, L, R)


@pytest.mark.parametrize("damping", [0.0, -1e-3, float("nan"), float("inf")])
def test_damping_is_positive(factors, damping):
    with pytest.raises(ValueError, match=r"damping is .*; it must be positive, 1e-06 for example"):
        precondition(*factors, damping=damping)
