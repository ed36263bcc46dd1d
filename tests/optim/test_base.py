"""What must survive pickling and checkpoints."""

import copy
import pickle

import pytest
import torch

from hf_lrq.optim import RiemannianAdamW, RiemannianSGD

FACTORIES = {
    "one_sided": lambda groups: RiemannianAdamW(groups, lr=1e-2),
    "two_sided": lambda groups: RiemannianAdamW(groups, lr=1e-2, precond="two_sided", clip_projected=1.0),
    "kept": lambda groups: RiemannianAdamW(groups, lr=1e-2, precond="two_sided", refresh=2),
    "sgd": lambda groups: RiemannianSGD(groups, lr=1e-2, momentum=0.9, nesterov=True),
}


@pytest.fixture(autouse=True)
def _no_fresh_steps(monkeypatch):
    """Preconditioners that are kept are kept from the first step on."""
    monkeypatch.setattr("hf_lrq.optim.base.FRESH_STEPS", 0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORIES)
def test_resuming_from_a_checkpoint_is_bit_exact(name, dtype, train, through_a_file):
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


def test_options_travel_with_the_state(through_a_file):
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


def test_a_state_with_the_former_name_of_a_preconditioner_is_taken_over(train, through_a_file):
    """And training goes on with it, bit for bit."""
    params, groups = problem()
    optimizer = RiemannianAdamW(groups, lr=1e-2)
    train(params, optimizer, 2)
    saved = through_a_file(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["precond"] = "pre"
    resumed, groups = problem()
    for p, q in zip(resumed, params, strict=True):
        p.data.copy_(q.detach())
    other = RiemannianAdamW(groups, precond="two_sided")
    other.load_state_dict(saved)
    assert {group["precond"] for group in other.param_groups} == {"one_sided"}
    assert {group["precond"] for group in other.state_dict()["param_groups"]} == {"one_sided"}
    train(params, optimizer, 2, first=2)
    train(resumed, other, 2, first=2)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


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
def test_a_pickled_optimizer_goes_on_as_the_original(name, duplicate, train):
    params, groups = problem()
    optimizer = FACTORIES[name](groups)
    train(params, optimizer, 2)
    twin = duplicate(optimizer)
    twins = [p for group in twin.param_groups for p in group["params"]]
    train(params, optimizer, 2, first=2)
    train(twins, twin, 2, first=2)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert not any(p is q for p, q in zip(params, twins, strict=True))


def test_the_moments_of_16_bit_factors_are_float32_after_loading_too(train, through_a_file):
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
