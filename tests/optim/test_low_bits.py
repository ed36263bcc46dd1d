"""16-bit parameters that take the steps of float32 ones."""

import pytest
import torch

from hf_lrq.optim import RiemannianAdamW, RiemannianSGD


def drift(dtype, factory, **options):
    """|L R - M| / |M| after 500 small steps from factors that are 20 % too large, for given storage."""
    generator = torch.Generator().manual_seed(3)
    L0, R0 = torch.randn(48, 4, generator=generator), torch.randn(4, 48, generator=generator)
    L, R = ((1.1 * x).to(dtype).requires_grad_() for x in (L0, R0))
    M = L0 @ R0
    optimizer = factory([{"params": [L, R], "paired": True}], **options)
    for _ in range(500):
        E = L.detach().float() @ R.detach().float() - M
        L.grad, R.grad = (E @ R.detach().float().T).to(dtype), (L.detach().float().T @ E).to(dtype)
        optimizer.step()
    return ((L.float() @ R.float() - M).norm() / M.norm()).item()


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (RiemannianAdamW, {"lr": 1e-4, "precond": "none"}),
        (RiemannianAdamW, {"lr": 1e-4}),
        (RiemannianAdamW, {"lr": 1e-3, "precond": "two_sided"}),
        (RiemannianSGD, {"lr": 1e-3}),
    ],
)
def test_with_compensation_bfloat16_factors_follow_float32_and_without_they_stand_still(factory, options):
    """Steps of 1e-3 of a value vanish in its last bfloat16 bit, 2^-8, if nothing remembers them."""
    start = 1.1**2 - 1
    exact = drift(torch.float32, factory, **options)
    assert exact < 0.85 * start
    assert drift(torch.bfloat16, factory, **options) == pytest.approx(exact, rel=0.02, abs=0.003)
    assert drift(torch.bfloat16, factory, kahan=False, **options) > exact + 0.05 * start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_a_compensated_parameter_is_the_float32_one_rounded(dtype, size):
    """A thousand steps of 1e-5 of the value, of which the 16-bit numbers alone would keep none."""
    generator = torch.Generator().manual_seed(0)
    exact = (size * (0.5 + torch.rand(40, generator=generator))).to(dtype).float().requires_grad_()
    p, lossy = (exact.detach().to(dtype).requires_grad_() for _ in range(2))
    start = exact.detach().clone()
    optimizers = [
        RiemannianSGD([exact], lr=1e-5),
        RiemannianSGD([p], lr=1e-5),
        RiemannianSGD([lossy], lr=1e-5, kahan=False),
    ]
    for _ in range(1000):
        for x in (exact, p, lossy):
            x.grad = start.to(x.dtype)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(p, exact.to(dtype))
    assert torch.equal(lossy, start.to(dtype))
    assert not torch.equal(p, lossy)


def test_values_near_zero_keep_the_accuracy_of_float16():
    p = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    optimizer = RiemannianSGD([p], lr=1.0)
    for _ in range(100):
        p.grad = torch.tensor([-3e-6, 2e-6, -2e-7], dtype=torch.float16)
        optimizer.step()
    expected = 100 * torch.tensor([3e-6, -2e-6, 2e-7], dtype=torch.float16)
    torch.testing.assert_close(p.detach(), expected, rtol=0.02, atol=0)
