"""What must survive: pickling, checkpoints, 16-bit factors."""

import copy
import io
import pickle

import pytest
import torch

from hf_lrq.optim import RiemannianAdamW, RiemannianSGD

FACTORIES = {
    "pre": lambda groups: RiemannianAdamW(groups, lr=1e-2),
    "two_sided": lambda groups: RiemannianAdamW(groups, lr=1e-2, precond="two_sided", clip_projected=1.0),
    "kept": lambda groups: RiemannianAdamW(groups, lr=1e-2, precond="two_sided", refresh=2),
    "sgd": lambda groups: RiemannianSGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
}


@pytest.fixture(autouse=True)
def _no_fresh_steps(monkeypatch):
    """Preconditioners that are kept are kept from the first step on."""
    monkeypatch.setattr("hf_lrq.optim.paired.FRESH_STEPS", 0)


def problem(dtype=torch.float32):
    """Parameters of two pairs and a bias, and their groups; the same at every call."""
    generator = torch.Generator().manual_seed(7)
    params = [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((7, 3), (3, 9), (2, 5, 4), (2, 4, 6), (7,))
    ]
    groups = [
        {"params": params[:4], "paired": True, "names": ["a.q_proj", "a.experts"], "scaling": 2.0},
        {"params": params[4:]},
    ]
    return params, groups


def train(params, optimizer, steps, first=0):
    """Steps along gradients that depend on the number of the step alone."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def through_a_file(state):
    """As a checkpoint: only tensors and primitives may be in it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORIES)
def test_resuming_from_a_checkpoint_is_bit_exact(name, dtype):
    params, groups = problem(dtype)
    optimizer = FACTORIES[name](groups)
    train(params, optimizer, 3)
    saved = through_a_file({"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    train(params, optimizer, 3, first=3)

    resumed, groups = problem(dtype)
    for p, value in zip(resumed, saved["model"], strict=True):
        p.data.copy_(value)
    optimizer = FACTORIES[name](groups)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 3, first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


def test_options_travel_with_the_state():
    _, groups = problem()
    optimizer = RiemannianAdamW(groups, lr=1e-2, damping=1e-3, precond="two_sided", clip_projected=2.0)
    state = through_a_file(optimizer.state_dict())
    other = RiemannianAdamW(problem()[1])
    other.load_state_dict(state)
    group = other.param_groups[0]
    assert (group["damping"], group["precond"], group["clip_projected"]) == (1e-3, "two_sided", 2.0)
    assert (group["paired"], group["scaling"], group["names"]) == (True, 2.0, ["a.q_proj", "a.experts"])


def test_a_state_from_before_an_option_was_there_gets_its_default():
    L, R = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (2, 4)))
    optimizer = RiemannianAdamW([{"params": [L, R], "paired": True}], lr=0.1)
    state = optimizer.state_dict()
    del state["param_groups"][0]["refresh"]
    optimizer.load_state_dict(state)
    L.grad, R.grad = torch.ones_like(L), torch.ones_like(R)
    optimizer.step()
    assert optimizer.param_groups[0]["refresh"] == 1


def test_a_state_of_other_pairs_is_refused():
    params, groups = problem()
    state = RiemannianAdamW(groups).state_dict()
    flat = RiemannianAdamW([{"params": problem()[0][:4]}, {"params": problem()[0][4:]}])
    with pytest.raises(ValueError, match=r"Group 0 has paired=False, in the saved state it has paired=True"):
        flat.load_state_dict(state)
    theirs = torch.optim.AdamW([{"params": params[:4]}, {"params": params[4:]}]).state_dict()
    with pytest.raises(ValueError, match=r"paired=None\. The state belongs to another optimizer"):
        RiemannianAdamW(problem()[1]).load_state_dict(theirs)


@pytest.mark.parametrize("duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
@pytest.mark.parametrize("name", FACTORIES)
def test_a_pickled_optimizer_goes_on_as_the_original(name, duplicate):
    params, groups = problem()
    optimizer = FACTORIES[name](groups)
    train(params, optimizer, 2)
    twin = duplicate(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    train(params, optimizer, 2, first=2)
    train(twins, twin, 2, first=2)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert not any(p is q for p, q in zip(params, twins, strict=True))


def test_the_moments_of_16_bit_factors_are_float32_after_loading_too():
    """torch's own loading would round them to the dtype of the parameter."""
    params, groups = problem(torch.bfloat16)
    optimizer = RiemannianAdamW(groups)
    train(params, optimizer, 2)
    other = RiemannianAdamW(problem(torch.bfloat16)[1])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for state, restored in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert restored["exp_avg"].dtype == restored["exp_avg_sq"].dtype == torch.float32
        assert restored["low_bits"].dtype == torch.int16
        assert all(torch.equal(state[key], restored[key]) for key in state)


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
