"""The Gram of a layer's inputs: streaming, validation, the damping ladder, the proxy loss."""

import pytest
import torch

from hf_lrq.decomposition import GramAccumulator, InputGram, proxy_loss
from hf_lrq.decomposition.gram import marginalise
from hf_lrq.errors import CalibrationError


def test_streamed_gram_equals_the_mean_outer_product_in_float64(generator):
    x = torch.randn(5000, 24, generator=generator) * 10
    accumulator = GramAccumulator(24)
    for part in x.split(777):
        accumulator.update(part.view(-1, 1, 24))
    expected = x.double().T @ x.double() / len(x)
    assert accumulator.n_tokens == 5000
    # float32 products over at most 2048 tokens: relative rounding of about sqrt(2048) * 2^-24.
    torch.testing.assert_close(accumulator.finish().H.double(), expected, rtol=3e-6, atol=3e-4)


def test_float64_total_keeps_a_small_signal_after_a_large_one():
    accumulator = GramAccumulator(1)
    accumulator.update(torch.full((1, 1), 1e4))
    for _ in range(64):
        accumulator.update(torch.full((1, 1), 1.0))  # 1e8 + 1 == 1e8 in float32
    assert accumulator.total.item() == 1e8 + 64


def test_merging_accumulators_equals_one_stream(generator):
    x = torch.randn(300, 8, generator=generator)
    left, right, whole = GramAccumulator(8), GramAccumulator(8), GramAccumulator(8)
    left.update(x[:100])
    right.update(x[100:])
    whole.update(x[:100])
    whole.update(x[100:])
    left.merge(right)
    assert left.n_tokens == whole.n_tokens
    assert torch.equal(left.total, whole.total)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_non_finite_or_overflowing_activations_are_refused(bad):
    x = torch.ones(4, 3)
    x[2, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        GramAccumulator(3).update(x)


def test_activations_of_another_width_are_refused():
    """One column would otherwise be broadcast over the whole Gram."""
    with pytest.raises(CalibrationError, match=r"for 4 inputs, got activations of \(2, 1\)"):
        GramAccumulator(4).update(torch.ones(2, 1))


def test_autocast_does_not_reach_the_gram(generator):
    x = torch.randn(500, 24, generator=generator)
    plain, cast = GramAccumulator(24), GramAccumulator(24)
    plain.update(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(x)
    assert torch.equal(plain.total, cast.total)


def test_no_tokens_is_an_error():
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        InputGram.from_inputs(torch.empty(0, 3))


@pytest.mark.parametrize(
    ("H", "message"),
    [
        (torch.zeros(3, 3), "is zero"),
        (torch.ones(3, 2), "square"),
        (torch.full((2, 2), float("nan")), "NaN"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (torch.diag(torch.tensor([1.0, -1.0])), "trace that is not positive"),
        (torch.eye(2, dtype=torch.float64) * 1e60, "Inf"),
        (torch.eye(2, dtype=torch.float64) * 1e-60, "is zero"),
    ],
)
def test_impossible_grams_are_refused(H, message):
    with pytest.raises(CalibrationError, match=message):
        InputGram.from_matrix(H, 10)


def test_damping_factorises_a_singular_gram(generator):
    x = torch.randn(4, 64, generator=generator)  # rank 4 of 64
    damped = InputGram.from_inputs(x).damped(0.01)
    assert damped.damping == 0.01
    assert damped.steps == ()
    torch.testing.assert_close(damped.M @ damped.M.T, damped.H, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(damped.H.diagonal().mean(), torch.tensor(1.01), rtol=1e-5, atol=0)


def test_damping_escalates_and_says_so_when_the_factorisation_fails(generator):
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    H = Q @ torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -0.5])) @ Q.T  # mean diagonal 0.75
    damped = InputGram.from_matrix(H, 10).damped(0.01)
    assert damped.damping == pytest.approx(1.0)
    assert len(damped.steps) == 2
    assert "damping 0.01" in damped.steps[0]


def test_a_gram_beyond_damping_has_its_negative_eigenvalues_cut(generator):
    Q = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    H = Q @ torch.diag(torch.tensor([9.0, 1.0, 1.0, -7.0])) @ Q.T
    damped = InputGram.from_matrix(H, 10).damped(0.1)
    assert "negative eigenvalues cut" in damped.steps[-1]
    assert torch.linalg.eigvalsh(damped.H).min() > 0


def test_proxy_loss_by_hand_and_at_its_ends(generator):
    W, H = torch.eye(2), torch.diag(torch.tensor([1.0, 3.0]))
    assert proxy_loss(W, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), H) == 0.75
    assert proxy_loss(W, W, H) == 0
    assert proxy_loss(W, torch.zeros(2, 2), H) == 1
    assert proxy_loss(torch.zeros(2, 2), torch.zeros(2, 2), H) == 0
    assert proxy_loss(torch.zeros(2, 2), W, H) == float("inf")


def test_proxy_loss_is_the_relative_output_error(generator):
    x, W, V = (torch.randn(*shape, generator=generator) for shape in ((500, 12), (7, 12), (7, 12)))
    H = InputGram.from_inputs(x).H
    expected = ((x @ (W - V).T).square().sum() / (x @ W.T).square().sum()).item()
    assert proxy_loss(W, V, H) == pytest.approx(expected, rel=1e-4)


def test_the_marginalised_gram_is_the_loss_after_refitting_L(generator):
    """min over L of tr((E - L R) H (E - L R)^T) = tr(E H_q E^T) for every E, with H_q undamped."""
    x = torch.randn(2000, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    gram = InputGram.from_inputs(x).damped(0.01)
    R, E = torch.randn(8, 96, generator=generator), torch.randn(5, 96, generator=generator).double()
    H_q = marginalise(gram, R, 0.0).double()
    H, R = gram.H.double(), R.double()
    refitted = E - E @ H @ R.T @ torch.linalg.inv(R @ H @ R.T) @ R
    expected = ((refitted @ H) * refitted).sum()
    torch.testing.assert_close(((E @ H_q) * E).sum(), expected, rtol=1e-3, atol=0)


def test_without_a_row_the_marginalised_gram_is_the_gram(generator):
    gram = InputGram.from_inputs(torch.randn(50, 6, generator=generator)).damped(0.01)
    assert torch.equal(marginalise(gram, torch.zeros(0, 6), 0.2), gram.H)


def test_magnitudes_are_streamed_and_merged(generator):
    x = torch.randn(5000, 6, generator=generator)
    left, right = GramAccumulator(6), GramAccumulator(6)
    for part in x[:3000].split(700):
        left.update(part)
    right.update(x[3000:])
    left.merge(right)
    torch.testing.assert_close(left.finish().magnitudes, x.abs().mean(0))
    assert InputGram.from_matrix(torch.eye(6), 3).magnitudes is None
