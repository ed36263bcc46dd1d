"""What preconditioning is for: rates that depend neither on the condition number of L R nor on how it is split."""

import math

import pytest
import torch
from torch import Tensor

from hf_lrq.optim import RiemannianAdamW, RiemannianSGD

SIZE, RANK = 64, 4
LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


def target(condition: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma, V of a rank-4 matrix with the given condition number and norm about 1; float64."""
    U, V = (torch.linalg.qr(torch.randn(SIZE, RANK, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    return U, torch.logspace(0, -math.log10(condition), RANK, dtype=torch.float64), V


def near(M: Tensor, sigma: Tensor, distance: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Balanced factors with |L R - M| = distance * sigma_r, from the SVD of a disturbed M."""
    noise = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    low, high = 0.0, 1.0
    for _ in range(60):  # |L R - M| grows with the size of the disturbance.
        size = (low + high) / 2
        U, S, Vt = torch.linalg.svd(M + size * sigma[-1] * noise / noise.norm())
        L, R = U[:, :RANK] * S[:RANK].sqrt(), S[:RANK].sqrt()[:, None] * Vt[:RANK]
        low, high = (low, size) if (L @ R - M).norm() > distance * sigma[-1] else (size, high)
    return L, R


def lora_start(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """L zero, R uniform: what PEFT does."""
    R = torch.rand(RANK, SIZE, generator=generator, dtype=torch.float64) * 2 - 1
    return torch.zeros(SIZE, RANK, dtype=torch.float64), R / math.sqrt(SIZE)


def tiny_start(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both factors random and about a hundred times too small."""
    L, R = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((SIZE, RANK), (RANK, SIZE)))
    return 1e-3 * L, 1e-3 * R


def errors_after(
    steps: int, start: tuple[Tensor, Tensor], M: Tensor, rates: tuple[float, ...], **options
) -> list[float]:
    """|L R - M| / |M| after `steps` of RiemannianAdamW with a cosine schedule, for each learning rate."""
    pairs = [[x.clone().requires_grad_() for x in start] for _ in rates]
    groups = [{"params": pair, "paired": True, "lr": lr} for pair, lr in zip(pairs, rates, strict=True)]
    optimizer = RiemannianAdamW(groups, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    for _ in range(steps):
        for L, R in pairs:
            E = (L @ R - M).detach()
            L.grad, R.grad = E @ R.detach().T, L.detach().T @ E
        optimizer.step()
        schedule.step()
    return [((L @ R - M).norm() / M.norm()).item() for L, R in pairs]


@pytest.mark.parametrize(("eta", "iterations"), [(0.3, 34), (0.5, 18), (0.667, 11)])
@pytest.mark.parametrize("condition", [1, 10, 100, 1000, 1e4])
def test_scaled_gradient_descent_takes_the_same_number_of_steps_for_every_condition_number(
    generator, condition, eta, iterations
):
    """From 0.15 to 1e-6 of the smallest singular value, by (1 - eta) in each step (Tong, Ma & Chi, 2021)."""
    U, sigma, V = target(condition, generator)
    M = U * sigma @ V.T
    L, R = (x.requires_grad_() for x in near(M, sigma, 0.15, generator))
    optimizer = RiemannianSGD([{"params": [L, R], "paired": True}], lr=eta, damping=1e-12)
    count = 0
    while (error := L @ R - M).norm() > 1e-6 * sigma[-1]:
        optimizer.zero_grad()
        (error.square().sum() / 2).backward()
        optimizer.step()
        count += 1
        assert count < 100
    assert count == iterations
    assert abs(count - math.log(1e-6 / 0.15) / math.log(1 - eta)) <= 1


def test_plain_gradient_descent_does_depend_on_the_condition_number(generator):
    """The control: as fast for condition 1, and several times slower for condition 10."""
    counts = []
    for condition in (1, 10):
        U, sigma, V = target(condition, generator)
        M = U * sigma @ V.T
        L, R = (x.requires_grad_() for x in near(M, sigma, 0.15, generator))
        optimizer = RiemannianSGD([{"params": [L, R], "paired": True}], lr=0.5, precond="none")
        counts.append(0)
        while (error := L @ R - M).norm() > 1e-6 * sigma[-1]:
            optimizer.zero_grad()
            (error.square().sum() / 2).backward()
            optimizer.step()
            counts[-1] += 1
    assert counts[0] <= 18
    assert counts[1] > 100


def test_a_cold_adapter_on_an_ill_conditioned_target_gets_there_only_with_preconditioning(generator):
    """LoRA start, condition 100, 500 steps, the best of four learning rates each."""
    U, sigma, V = target(100, generator)
    M, start = U * sigma @ V.T, lora_start(generator)
    best = {
        precond: min(errors_after(500, start, M, LEARNING_RATES, precond=precond))
        for precond in ("one_sided", "two_sided", "none")
    }
    assert best["one_sided"] <= 1e-10
    assert best["two_sided"] <= 1e-10
    assert best["none"] >= 1e-4


@pytest.mark.parametrize("precond", ["one_sided", "two_sided"])
def test_it_gets_there_with_a_preconditioner_that_is_computed_every_tenth_step(generator, precond):
    U, sigma, V = target(100, generator)
    errors = errors_after(500, lora_start(generator), U * sigma @ V.T, (3e-2,), precond=precond, refresh=10)
    assert errors <= [1e-10]


def test_the_trust_bound_is_what_lets_two_sided_start_from_tiny_factors(generator):
    U, sigma, V = target(100, generator)
    M, start = U * sigma @ V.T, tiny_start(generator)
    assert errors_after(500, start, M, (3e-2,), precond="two_sided") <= [1e-8]
    assert errors_after(500, start, M, (3e-2,), precond="two_sided", trust=None) >= [1.0]


def test_two_sided_reaches_the_same_error_from_every_split(generator):
    """And "one_sided", like Adam, does not: after Adam's division the size of the preconditioned gradient is gone."""
    U, sigma, V = target(100, generator)
    M = U * sigma @ V.T
    L, R = near(M, sigma, 0.3, generator)
    errors = {
        precond: [errors_after(300, (L * c, R / c), M, (3e-3,), precond=precond)[0] for c in (1, 10, 100)]
        for precond in ("two_sided", "one_sided", "none")
    }
    assert max(errors["two_sided"]) - min(errors["two_sided"]) <= 1e-12
    assert max(errors["two_sided"]) <= 1e-8
    assert errors["one_sided"][2] > 1e-4
    assert errors["none"][2] > 1e-4


def test_momentum_helps_scaled_gradient_descent_at_a_small_step(generator):
    """Nesterov and heavy-ball both converge; at eta = 0.05 they need fewer steps than none."""
    U, sigma, V = target(1000, generator)
    M = U * sigma @ V.T
    start = near(M, sigma, 0.15, generator)
    counts = {}
    for name, options in (
        ("none", {}),
        ("heavy", {"momentum": 0.5}),
        ("nesterov", {"momentum": 0.5, "nesterov": True}),
    ):
        L, R = (x.clone().requires_grad_() for x in start)
        optimizer = RiemannianSGD([{"params": [L, R], "paired": True}], lr=0.05, damping=1e-12, **options)
        counts[name] = 0
        while (error := L @ R - M).norm() > 1e-6 * sigma[-1]:
            optimizer.zero_grad()
            (error.square().sum() / 2).backward()
            optimizer.step()
            counts[name] += 1
            assert counts[name] < 500
    assert counts["none"] > 1.7 * counts["heavy"]
    assert counts["none"] > 1.7 * counts["nesterov"]
