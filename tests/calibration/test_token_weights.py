"""Weights of tokens: their mean, and how far they are trusted."""

import pytest
import torch

from hf_lrq.calibration.token_weights import TokenWeights


def trained(x: torch.Tensor, weights: torch.Tensor) -> TokenWeights:
    found = TokenWeights(x.shape[-1])
    for batch, (each, weight) in enumerate(zip(x, weights, strict=True)):
        found.update(batch, each[None], weight[None])
    return found


def test_weights_that_say_nothing_of_the_inputs_become_equal(generator):
    x = torch.randn(48, 20, 16, generator=generator)
    found = trained(x, torch.rand(48, 20, generator=generator) ** 4)
    weights = found.finish()
    assert found.shrinkage > 0.5
    assert [weight.shape for (weight,) in weights.values()] == [(1, 20)] * 48


def test_a_sink_keeps_its_weight(generator):
    """The first token of every sequence is alike, and counts a hundred times."""
    x = torch.randn(48, 20, 16, generator=generator)
    x[:, 0] = torch.randn(16, generator=generator) * 3
    weights = torch.rand(48, 20, generator=generator) + 0.5
    weights[:, 0] *= 100
    found = trained(x, weights)
    counts = found.finish()
    assert found.shrinkage < 0.1
    assert counts[7][0][0, 0] > 30 * counts[7][0][0, 1:].mean()


def test_weighted_and_plain_gram_are_mixed_at_one_trace(generator):
    x = torch.randn(30, 10, 8, generator=generator) * torch.linspace(1, 2, 8)
    weights = torch.rand(30, 10, generator=generator) * 7 * (x[..., 0] > 0)
    found = trained(x, weights)
    counts = torch.cat([found.finish()[batch][0] for batch in range(30)])
    rows, s = x.flatten(0, 1), found.shrinkage
    plain = rows.T @ rows
    weighted = rows.T @ (weights.reshape(-1, 1) * rows)
    expected = (1 - s) * weighted * plain.trace() / weighted.trace() + s * plain
    torch.testing.assert_close(rows.T @ (counts.reshape(-1, 1) * rows), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["one sequence", "no gradient"])
def test_what_cannot_be_known_is_equal(generator, case):
    x = torch.randn(1 if case == "one sequence" else 9, 10, 8, generator=generator)
    weights = torch.rand(len(x), 10, generator=generator) * (case == "one sequence")
    found = trained(x, weights)
    assert all(torch.equal(weight, torch.ones(1, 10)) for (weight,) in found.finish().values())
    assert found.shrinkage == 1
