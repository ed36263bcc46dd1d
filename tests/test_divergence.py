"""How far two predictions are apart, against float64."""

import math

import pytest
import torch

from hf_lrq.divergence import kl_divergence


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0, 30.0])
def test_divergence_is_not_negative_and_right_to_a_rounding(spread: float, generator: torch.Generator) -> None:
    p = torch.randn(64, 1000, generator=generator)
    q = p + spread * torch.randn(64, 1000, generator=generator)
    log_p, log_q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    exact_p, exact_q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    exact = (exact_p.exp() * (exact_p - exact_q)).sum(-1)
    found = kl_divergence(log_p, log_q)
    assert (found > -1e-8).all()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=3e-8)


def test_tokens_that_both_models_exclude_do_not_count() -> None:
    log_p = torch.log_softmax(torch.tensor([[0.0, 1.0, -math.inf]]), -1)
    log_q = torch.log_softmax(torch.tensor([[1.0, 0.0, -math.inf]]), -1)
    expected = kl_divergence(log_p[:, :2], log_q[:, :2])
    assert torch.equal(kl_divergence(log_p, log_q), expected)
    assert torch.isfinite(expected).all()
