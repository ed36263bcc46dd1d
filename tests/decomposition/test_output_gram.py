"""The Gram of the gradients at the outputs: its mean, and how far it is trusted."""

import pytest
import torch
from torch import Tensor

from hf_lrq.decomposition import OutputGram, OutputGramAccumulator


def gram_of(sequences: Tensor) -> OutputGram:
    accumulator = OutputGramAccumulator(sequences.shape[-1])
    for sequence in sequences:
        assert accumulator.update(sequence)
    found = accumulator.finish()
    assert found is not None
    return found


def test_shrinkage_is_the_estimator_of_ledoit_and_wolf_over_sequences(generator):
    g = torch.randn(12, 30, 8, generator=generator) * torch.logspace(0, -1, 8)
    each = torch.stack([sequence.T @ sequence for sequence in g.double()])
    mean = each.mean(0)
    mu = mean.diagonal().mean()
    variance = (each - mean).square().sum((1, 2)).sum() / (12 * 11)  # of the mean
    expected = (variance / (mean - mu * torch.eye(8)).square().sum()).item()
    found = gram_of(g)
    assert 0 < expected < 1
    assert found.shrinkage == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        found.H.double(), (1 - expected) * mean / mu + expected * torch.eye(8).double(), rtol=1e-5, atol=1e-6
    )


def test_much_data_is_trusted_and_little_is_not(generator):
    scales = torch.linspace(1, 3, 24)

    def shrinkage(count: int) -> float:
        return gram_of(torch.randn(count, 16, 24, generator=generator) * scales).shrinkage

    many, few = shrinkage(400), shrinkage(4)
    assert many < 0.05 < few


def test_what_looks_like_noise_becomes_the_identity(generator):
    one = gram_of(torch.randn(1, 64, 6, generator=generator))
    assert one.shrinkage == 1
    torch.testing.assert_close(one.H, torch.eye(6))


def test_the_tokens_of_a_sequence_may_be_one_gradient_again_and_again(generator):
    """Repetition is no evidence: the shrinkage is that of one token a sequence."""
    g = torch.randn(20, 1, 5, generator=generator) * torch.linspace(1, 2, 5)
    assert gram_of(g.expand(-1, 50, -1)).shrinkage == pytest.approx(gram_of(g).shrinkage, rel=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_gradients_that_are_not_finite_are_reported_and_not_added(value):
    accumulator = OutputGramAccumulator(3)
    assert not accumulator.update(torch.tensor([[0.0, value, 0.0]]))
    assert accumulator.update(torch.eye(3))
    assert torch.equal(accumulator.total, torch.eye(3).double())


def test_without_gradients_there_is_no_gram():
    accumulator = OutputGramAccumulator(3)
    accumulator.update(torch.zeros(4, 3))
    assert accumulator.finish() is None
