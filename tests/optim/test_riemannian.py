"""One step of the optimizers: against a loop over pairs, against torch, and in every unusual situation."""

import math

import pytest
import torch
from torch.optim import AdamW

from hf_lrq.optim import RiemannianAdamW, RiemannianSGD, base, precondition, roots, update_batches

SHAPES = [(7, 3, 9), (7, 3, 9), (5, 3, 4), (12, 4, 6), (7, 3, 9)]


def parameters(generator, *shapes, dtype=torch.float64):
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def factor_list(generator, dtype=torch.float64):
    """L0, R0, L1, R1, ... of several shapes and ranks."""
    return [
        p
        for out, r, width in SHAPES
        for p in parameters(generator, (out, r), (r, width), dtype=dtype)
    ]  # fmt: skip


def give_gradients(params, generator):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def copies(params):
    return [p.detach().clone().requires_grad_() for p in params]


def share_gradients(source, target):
    for p, q in zip(source, target, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()


def loop_adam(params, memory, step, lr, precond, damping, betas=(0.9, 0.999), eps=1e-8, factors=None):
    """RiemannianAdamW written down pair by pair, with inverses and symmetric formulas spelled out.

    Preconditioned by `factors`; None for the parameters themselves.
    """
    moves = []
    factors = params if factors is None else factors
    for k in range(0, len(params), 2):
        L, R = factors[k].detach(), factors[k + 1].detach()
        grads = [params[k].grad, params[k + 1].grad]
        r = L.shape[1]
        G_L, G_R = L.T @ L, R @ R.T
        G_L, G_R = (G + damping * G.trace() / r * torch.eye(r, dtype=L.dtype) for G in (G_L, G_R))
        K_L, K_R = (torch.linalg.inv(torch.linalg.cholesky(G)) for G in (G_L, G_R))
        if precond == "one_sided":
            grads = [grads[0] @ torch.linalg.inv(G_R), torch.linalg.inv(G_L) @ grads[1]]
        else:
            grads = [grads[0] @ K_R.T, K_L @ grads[1]]
        directions = []
        for i, grad in enumerate(grads):
            m, v = memory.get(k + i, (torch.zeros_like(grad), torch.zeros_like(grad)))
            m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
            memory[k + i] = m, v
            directions.append(m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps))
        if precond == "two_sided":
            directions = [directions[0] @ K_R, K_L.T @ directions[1]]
        moves += directions
    for p, move in zip(params, moves, strict=True):
        p.data -= lr * move


@pytest.mark.parametrize("precond", ["one_sided", "two_sided"])
@pytest.mark.parametrize("stacked_elements", [1, 2**20])
@pytest.mark.parametrize("batch_elements", [1, 100, 2**20])
@pytest.mark.parametrize("by_columns", [False, True])
def test_adamw_equals_a_loop_over_the_pairs(
    generator, precond, stacked_elements, batch_elements, by_columns, monkeypatch
):
    """However the pairs are batched, stacked for products, and laid out in memory."""
    monkeypatch.setattr(update_batches, "BATCH_ELEMENTS", batch_elements)
    monkeypatch.setattr(roots, "STACKED_ELEMENTS", stacked_elements)
    params = factor_list(generator)
    if by_columns:
        params = [p.detach().mT.contiguous().mT.requires_grad_() for p in params]
    naive, memory = copies(params), {}
    group = {"params": params, "paired": True}
    optimizer = RiemannianAdamW([group], lr=1e-2, precond=precond, damping=1e-3, trust=None)
    for step in range(1, 6):
        give_gradients(params, generator)
        share_gradients(params, naive)
        optimizer.step()
        loop_adam(naive, memory, step, 1e-2, precond, 1e-3)
        torch.testing.assert_close(params, naive, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precond", ["one_sided", "two_sided"])
@pytest.mark.parametrize("stacked_elements", [1, 2**20])
def test_a_preconditioner_serves_for_as_many_steps_as_it_is_told(generator, precond, stacked_elements, monkeypatch):
    """After some at the beginning; here the first four."""
    monkeypatch.setattr(roots, "STACKED_ELEMENTS", stacked_elements)
    monkeypatch.setattr(base, "FRESH_STEPS", 4)
    params = factor_list(generator)
    naive, memory = copies(params), {}
    group = {"params": params, "paired": True}
    optimizer = RiemannianAdamW([group], lr=1e-2, precond=precond, damping=1e-3, trust=None, refresh=3)
    for step in range(1, 9):
        give_gradients(params, generator)
        share_gradients(params, naive)
        optimizer.projected_grad_norm()  # Which is no step.
        optimizer.step()
        if step <= 4 or step % 3 == 1:
            factors = copies(naive)
        loop_adam(naive, memory, step, 1e-2, precond, 1e-3, factors=factors)
        torch.testing.assert_close(params, naive, rtol=1e-10, atol=1e-12)


def test_a_factor_that_had_no_gradient_when_others_were_refreshed_gets_its_own(generator, monkeypatch):
    monkeypatch.setattr(base, "FRESH_STEPS", 0)
    params = factor_list(generator)
    give_gradients(params[:4], generator)
    optimizer = RiemannianSGD([{"params": params, "paired": True}], lr=0.1, refresh=10)
    optimizer.step()
    for p in params:
        p.grad = None
    give_gradients(params[4:], generator)
    expected = precondition(params[4].grad, params[5].grad, params[4].detach(), params[5].detach())
    before = params[4].detach().clone()
    optimizer.step()
    torch.testing.assert_close(params[4].detach(), before - 0.1 * expected[0])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torch_sgd_on_preconditioned_gradients(generator, nesterov):
    params = factor_list(generator)
    naive = copies(params)
    options = {"lr": 1e-2, "momentum": 0.9, "nesterov": nesterov}
    optimizer = RiemannianSGD([{"params": params, "paired": True}], damping=1e-3, **options)
    reference = torch.optim.SGD(naive, **options)
    for _ in range(4):
        give_gradients(params, generator)
        for k in range(0, len(params), 2):
            pair = naive[k], naive[k + 1]
            pair[0].grad, pair[1].grad = precondition(
                params[k].grad, params[k + 1].grad, *(p.detach() for p in pair), damping=1e-3
            )
        optimizer.step()
        reference.step()
        torch.testing.assert_close(params, naive, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("paired", [False, True])
def test_without_preconditioning_it_is_torch_adamw_bit_for_bit(generator, dtype, paired):
    params = factor_list(generator, dtype)
    theirs = copies(params)
    options = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    optimizer = RiemannianAdamW([{"params": params, "paired": paired}], precond="none", **options)
    reference = AdamW(theirs, foreach=True, **options)
    for _ in range(5):
        give_gradients(params, generator)
        share_gradients(params, theirs)
        optimizer.step()
        reference.step()
        assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))


def test_plain_groups_beside_pairs_are_torch_adamw_bit_for_bit(generator):
    factors, plain = factor_list(generator), parameters(generator, (4, 5), (5,), ())
    theirs = copies(plain)
    optimizer = RiemannianAdamW(
        [{"params": factors, "paired": True}, {"params": plain[:1], "weight_decay": 0.1}, {"params": plain[1:]}],
        lr=0.01,
    )
    reference = AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}], lr=0.01, weight_decay=0, foreach=True
    )
    for _ in range(3):
        give_gradients(factors + plain, generator)
        share_gradients(plain, theirs)
        optimizer.step()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(plain, theirs, strict=True))


@pytest.mark.parametrize("stacked_elements", [1, 2**20])
def test_stacks_of_experts_take_the_steps_their_matrices_would_take_alone(generator, stacked_elements, monkeypatch):
    """With a trust bound, for each matrix its own, that binds."""
    monkeypatch.setattr(roots, "STACKED_ELEMENTS", stacked_elements)
    L, R = parameters(generator, (5, 7, 3), (5, 3, 9))
    alone = [copies([L[e], R[e]]) for e in range(5)]
    optimizers = [
        RiemannianAdamW([{"params": pair, "paired": True}], lr=0.1, precond="two_sided", trust=0.05)
        for pair in [[L, R], *alone]
    ]
    for _ in range(3):
        give_gradients([L, R], generator)
        for e, pair in enumerate(alone):
            pair[0].grad, pair[1].grad = L.grad[e], R.grad[e]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(L, torch.stack([pair[0] for pair in alone]))
    torch.testing.assert_close(R, torch.stack([pair[1] for pair in alone]))


def product_step(optimizer_class, L, R, grad_W, scaling=1.0, steps=3, **options):
    """The product s L R after steps along a constant dLoss/dW."""
    L, R = (x.clone().requires_grad_() for x in (L, R))
    optimizer = optimizer_class([{"params": [L, R], "paired": True, "scaling": scaling}], **options)
    for _ in range(steps):
        L.grad, R.grad = scaling * grad_W @ R.detach().T, scaling * L.detach().T @ grad_W
        optimizer.step()
    return scaling * (L @ R).detach()


def test_sgd_moves_the_product_alike_for_every_split(generator):
    L, R, grad_W, A = (torch.randn(s, generator=generator).double() for s in ((7, 3), (3, 9), (7, 9), (3, 3)))
    options = {"lr": 0.1, "damping": 1e-14, "momentum": 0.5}
    moved = product_step(RiemannianSGD, L, R, grad_W, **options)
    other = product_step(RiemannianSGD, L @ A, torch.linalg.solve(A, R), grad_W, **options)
    torch.testing.assert_close(other, moved, rtol=1e-9, atol=1e-9)


def test_two_sided_adamw_moves_the_product_alike_for_every_scale_of_the_ranks(generator):
    L, R, grad_W = (torch.randn(s, generator=generator).double() for s in ((7, 3), (3, 9), (7, 9)))
    scales = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    options = {"lr": 0.1, "damping": 1e-14, "precond": "two_sided", "trust": None}
    moved = product_step(RiemannianAdamW, L, R, grad_W, **options)
    other = product_step(RiemannianAdamW, L * scales, R / scales[:, None], grad_W, **options)
    torch.testing.assert_close(other, moved, rtol=1e-8, atol=1e-8)
    one_sided = [
        product_step(RiemannianAdamW, L * c, R / c, grad_W, **{**options, "precond": "one_sided"}) for c in (1.0, 50.0)
    ]
    assert (one_sided[0] - one_sided[1]).norm() > 0.1 * (one_sided[0] - L @ R).norm()


@pytest.mark.parametrize("options", [{"precond": "two_sided"}, {"precond": "two_sided", "clip_projected": 0.5}])
def test_the_scaling_of_an_adapter_does_not_change_the_step_on_the_weight(generator, options):
    """W = s L R written with s = 1 and with s = 4, factors rescaled to match."""
    L, R, grad_W = (torch.randn(s, generator=generator).double() for s in ((7, 3), (3, 9), (7, 9)))
    moved = product_step(RiemannianAdamW, L, R, grad_W, lr=0.01, **options)
    scaled = product_step(RiemannianAdamW, L / 2, R / 2, grad_W, scaling=4.0, lr=0.01, **options)
    torch.testing.assert_close(scaled, moved)
    scaled = product_step(RiemannianSGD, L / 2, R / 2, grad_W, scaling=4.0, lr=0.01)
    torch.testing.assert_close(scaled, product_step(RiemannianSGD, L, R, grad_W, lr=0.01))


@pytest.mark.parametrize("precond", ["one_sided", "two_sided"])
def test_a_zero_factor_starts_and_its_partner_follows_one_step_later(generator, precond):
    """LoRA: while L is zero, so is the gradient of R."""
    L, R = parameters(generator, (7, 3), (3, 9))
    L.data.zero_()
    target = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    optimizer = RiemannianAdamW([{"params": [L, R], "paired": True}], lr=1e-2, precond=precond)
    values = [R.detach().clone()]
    for _ in range(2):
        optimizer.zero_grad()
        (L @ R - target).square().sum().backward()
        optimizer.step()
        values.append(R.detach().clone())
    assert L.isfinite().all()
    assert L.norm() > 0
    assert torch.equal(values[1], values[0])
    assert values[2].isfinite().all()
    assert not torch.equal(values[2], values[1])


def test_two_sided_steps_are_at_most_trust_times_the_factor(generator):
    L, R = parameters(generator, (7, 3), (3, 9))
    L.data *= 1e-6
    before = R.detach().clone()
    give_gradients([L, R], generator)
    RiemannianAdamW([{"params": [L, R], "paired": True}], lr=1.0, precond="two_sided", trust=0.2).step()
    assert ((R - before).norm() / before.norm()).item() == pytest.approx(0.2)


def test_lr_ratio_multiplies_the_learning_rate_of_L(generator):
    for precond in ("none", "one_sided", "two_sided"):
        L, R = parameters(generator, (7, 3), (3, 9))
        both = [copies([L, R]), copies([L, R])]
        give_gradients([L, R], generator)
        for pair, ratio in zip(both, (1.0, 16.0), strict=True):
            share_gradients([L, R], pair)
            group = {"params": pair, "paired": True}
            RiemannianAdamW([group], lr=1e-4, lr_ratio=ratio, precond=precond, trust=None).step()
        torch.testing.assert_close(both[1][0] - L, 16 * (both[0][0] - L))
        assert torch.equal(both[1][1], both[0][1])


def test_the_projected_norm_is_that_of_the_gradient_on_the_row_and_column_spaces(generator):
    L, R, plain = parameters(generator, (7, 3), (3, 9), (4,))
    grad_W = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    P_row = R.T @ torch.linalg.pinv(R.T)
    P_column = L @ torch.linalg.pinv(L)
    expected = (grad_W @ P_row).square().sum() + (P_column @ grad_W).square().sum() + 4.0
    groups = [{"params": [L, R], "paired": True, "scaling": 0.5}, {"params": [plain]}]
    for precond in ("one_sided", "two_sided"):
        optimizer = RiemannianAdamW(groups, precond=precond, damping=1e-12)
        L.grad, R.grad = 0.5 * grad_W @ R.detach().T, 0.5 * L.detach().T @ grad_W
        plain.grad = torch.ones_like(plain)
        assert optimizer.projected_grad_norm().item() == pytest.approx(math.sqrt(expected.item()), rel=1e-6)


def test_clipping_scales_all_gradients_by_one_number(generator):
    """A step with the limit at half of the norm is a step with half of all gradients, those of plain parameters too."""
    params = parameters(generator, (7, 3), (3, 9), (4,))
    give_gradients(params, generator)
    runs = {}
    for name, factor, clip in (("clipped", 1.0, 0.5), ("half", 0.5, None), ("loose", 0.5, 2.0)):
        own = copies(params)
        share_gradients(params, own)
        optimizer = RiemannianSGD([{"params": own[:2], "paired": True}, {"params": own[2:]}], lr=0.1)
        norm = optimizer.projected_grad_norm().item()
        for group in optimizer.param_groups:
            group["clip_projected"] = None if clip is None else clip * norm
        for p in own:
            p.grad *= factor
        optimizer.step()
        runs[name] = own
    torch.testing.assert_close(runs["clipped"], runs["half"])
    assert all(torch.equal(p, q) for p, q in zip(runs["loose"], runs["half"], strict=True))


def test_gradients_are_left_as_backward_wrote_them(generator):
    params = factor_list(generator)
    give_gradients(params, generator)
    before = [p.grad.clone() for p in params]
    for precond in ("one_sided", "two_sided", "none"):
        RiemannianAdamW([{"params": params, "paired": True}], precond=precond, clip_projected=0.1).step()
    RiemannianSGD([{"params": params, "paired": True}], momentum=0.9, nesterov=True).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_a_closure_is_evaluated_and_preconditioned(generator):
    L, R = parameters(generator, (7, 3), (3, 9))
    twin = copies([L, R])
    optimizers = [RiemannianSGD([{"params": pair, "paired": True}], lr=0.1) for pair in ([L, R], twin)]

    def loss_of(pair, optimizer):
        optimizer.zero_grad()
        loss = (pair[0] @ pair[1]).square().sum()
        loss.backward()
        return loss

    returned = optimizers[0].step(lambda: loss_of((L, R), optimizers[0]))
    assert returned.item() == loss_of(twin, optimizers[1]).item()
    optimizers[1].step()
    assert torch.equal(L, twin[0])
    assert torch.equal(R, twin[1])


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_factor_of_a_pair_may_be_frozen_and_still_preconditions_the_other(generator, frozen):
    pair = parameters(generator, (7, 3), (3, 9))
    other = parameters(generator, (7, 3), (3, 9))
    give_gradients(pair + other, generator)
    pair[frozen].requires_grad_(False)
    pair[frozen].grad = None
    expected = precondition(*(torch.zeros_like(p) if p.grad is None else p.grad for p in pair), *pair)
    before = [p.detach().clone() for p in pair]
    optimizer = RiemannianSGD([{"params": pair + other, "paired": True}], lr=0.1)
    optimizer.step()
    trained = 1 - frozen
    assert torch.equal(pair[frozen], before[frozen])
    torch.testing.assert_close(pair[trained], before[trained] - 0.1 * expected[trained])


def test_pairs_without_gradients_and_empty_steps_change_nothing(generator):
    params = factor_list(generator)
    before = [p.detach().clone() for p in params]
    optimizer = RiemannianAdamW([{"params": params, "paired": True, "weight_decay": 0.5}], clip_projected=1.0)
    optimizer.step()
    assert optimizer.projected_grad_norm() == 0
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("factory", [RiemannianAdamW, RiemannianSGD])
def test_replacing_the_entries_of_a_group_is_followed(generator, factory):
    """What accelerate does under FSDP2: the optimizer is built first, its parameters are swapped afterwards."""
    L, R = parameters(generator, (7, 3), (3, 9))
    optimizer = factory([{"params": [torch.empty(7, 3), torch.empty(3, 9)], "paired": True}], lr=0.1)
    reference = factory([{"params": (twin := copies([L, R])), "paired": True}], lr=0.1)
    for i, p in enumerate((L, R)):
        optimizer.param_groups[0]["params"][i] = torch.empty(1)
        optimizer.param_groups[0]["params"][i] = p
    give_gradients([L, R], generator)
    share_gradients([L, R], twin)
    optimizer.step()
    reference.step()
    assert torch.equal(L, twin[0])
    assert torch.equal(R, twin[1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_moves(generator, value):
    params = factor_list(generator)
    give_gradients(params, generator)
    params[5].grad[0, 1] = value
    before = [p.detach().clone() for p in params]
    names = [f"layers.{i}.proj" for i in range(len(SHAPES))]
    optimizer = RiemannianAdamW([{"params": params, "paired": True, "names": names}])
    with pytest.raises(FloatingPointError, match=r"R of pair 2 \(layers\.2\.proj\) in group 0\. Nothing was updated"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert not optimizer.state
    del optimizer.param_groups[0]["names"]
    with pytest.raises(FloatingPointError, match=r"R of pair 2 in group 0\."):
        optimizer.step()


def test_a_factor_that_is_not_finite_is_named(generator):
    params = factor_list(generator)
    give_gradients(params, generator)
    params[6].data[0, 0] = math.nan
    optimizer = RiemannianAdamW([{"params": params, "paired": True}])
    with pytest.raises(FloatingPointError, match=r"Pair 3 has a factor that is not finite"):
        optimizer.step()


def test_a_plain_gradient_that_is_not_finite_is_named(generator):
    named = [("head.weight", parameters(generator, (3, 3))[0]), ("head.bias", parameters(generator, (3,))[0])]
    give_gradients([p for _, p in named], generator)
    named[1][1].grad[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"parameter 1 \(head\.bias\) in group 0"):
        RiemannianSGD([{"params": named}]).step()


def test_sparse_gradients_are_refused(generator):
    (p,) = parameters(generator, (4, 3))
    p.grad = torch.eye(4, 3, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match="parameter 0 in group 0 is sparse"):
        RiemannianAdamW([p]).step()


def test_parameters_flattened_by_a_wrapper_are_noticed_at_the_step(generator):
    optimizer = RiemannianAdamW([{"params": parameters(generator, (7, 3), (3, 9)), "paired": True}])
    flat = parameters(generator, (21,), (27,))
    give_gradients(flat, generator)
    optimizer.param_groups[0]["params"] = flat
    before = [p.detach().clone() for p in flat]
    with pytest.raises(ValueError, match="use precondition_gradients with any optimizer instead"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(flat, before, strict=True))
    assert not optimizer.state


def test_a_learning_rate_schedule_reaches_the_pairs(generator):
    L, R = parameters(generator, (7, 3), (3, 9))
    optimizer = RiemannianSGD([{"params": [L, R], "paired": True}], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0)
    before = L.detach().clone()
    give_gradients([L, R], generator)
    optimizer.step()
    schedule.step()
    assert torch.equal(L, before)


def test_weight_decay_shrinks_the_product_by_its_square(generator):
    L, R = parameters(generator, (7, 3), (3, 9))
    before = (L @ R).detach()
    for p in (L, R):
        p.grad = torch.zeros_like(p)
    RiemannianAdamW([{"params": [L, R], "paired": True}], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(L @ R, 0.95**2 * before)


def test_the_global_random_state_is_not_touched(generator, rng_untouched):
    params = factor_list(generator)
    give_gradients(params, generator)
    RiemannianAdamW([{"params": params, "paired": True}], precond="two_sided", clip_projected=1.0).step()
