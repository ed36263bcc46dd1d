"""What L R is before the first step."""

import pytest
import torch

from hf_lrq.decomposition.gram import damp
from hf_lrq.decomposition.starts import inputs_start, split_start


@pytest.fixture
def gram(generator):
    x = torch.randn(300, 24, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, 24)
    return damp(x.T @ x / 300, 1e-3)


def test_the_inputs_start_spans_their_main_directions(generator, gram):
    L, R = inputs_start(torch.randn(9, 24, generator=generator, dtype=torch.float64), gram, 5)
    assert torch.equal(L, torch.zeros(9, 5, dtype=torch.float64))
    values = torch.linalg.eigvalsh(gram.H)
    torch.testing.assert_close((R @ gram.H @ R.T).diagonal(), values.flip(0)[:5])
    torch.testing.assert_close(R @ R.T, torch.eye(5, dtype=torch.float64))


def ranks_kept(W, gram, rank):
    return len(split_start(W, gram, rank, torch.Generator().manual_seed(0))[1])


def test_a_split_keeps_what_the_weight_has_of_low_rank(generator, gram):
    """Three strong directions are kept from rounding; without any, all ranks repair its noise."""
    noise = torch.randn(20, 24, generator=generator, dtype=torch.float64) @ torch.linalg.inv(gram.M)
    strong = torch.randn(20, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 24, generator=generator, dtype=torch.float64
    )
    assert ranks_kept(100 * strong + noise, gram, 6) == 3
    assert ranks_kept(100 * strong + noise, gram, 2) == 2
    assert ranks_kept(strong, gram, 0) == 0


def test_what_a_split_keeps_is_the_least_product(generator, gram):
    W, rank = torch.randn(20, 24, generator=generator, dtype=torch.float64), 7
    noise = torch.rand(W.shape, generator=torch.Generator().manual_seed(0)).double() - 0.5

    def left(A, k):
        sigma = torch.linalg.svdvals(A @ gram.M)
        return (sigma[k:].square().sum() / sigma.square().sum()).sqrt().item()

    products = [left(W, k) * left(noise, rank - k) for k in range(rank + 1)]
    assert ranks_kept(W, gram, rank) == products.index(min(products))
