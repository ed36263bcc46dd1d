"""Running averages that are kept in 8 bits between steps."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from hf_lrq.optim import RiemannianAdamW, RiemannianSGD
from hf_lrq.optim.eight_bit import BLOCK, SIGNED, SMALLEST, UNSIGNED, dynamic_values, exact_averages

FACTORIES = {
    "one_sided": lambda groups, bits: RiemannianAdamW(groups, lr=1e-2, state_bits=bits),
    "two_sided": lambda groups, bits: RiemannianAdamW(groups, lr=1e-2, precond="two_sided", state_bits=bits),
    "sgd": lambda groups, bits: RiemannianSGD(groups, lr=1e-2, momentum=0.9, nesterov=True, state_bits=bits),
}
AVERAGES = {"one_sided": 2, "two_sided": 2, "sgd": 1}
SHAPES = ((600, 7), (7, 700), (50, 3), (3, 40), (4097,), (33,))
LARGE = [0, 1, 4]  # 4,096 elements and more.


def problem(dtype=torch.float32):
    """Two pairs and two plain parameters, some of them large enough; the same at every call."""
    generator = torch.Generator().manual_seed(7)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]
    return params, [{"params": params[:4], "paired": True}, {"params": params[4:]}]


def bytes_of(optimizer, p):
    """Of the averages of one parameter."""
    kept = (tensor for key, tensor in optimizer.state[p].items() if key not in ("step", "low_bits"))
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


# --- the values


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED])
def test_the_values_are_those_of_bitsandbytes(code):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed=code.signed)
    torch.testing.assert_close(dynamic_values(code.signed), theirs, rtol=2e-7, atol=0)  # They round on the way.


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (3, 257), (2, 3, 512)])
def test_every_element_gets_the_nearest_value_of_its_block(code, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-8, 3, shape[-1])
    x = x if code.signed else x.square()
    codes, scales = code.encode(x)
    assert (codes.dtype, codes.shape) == (torch.uint8, x.shape)
    assert scales.shape == (-(-x.numel() // BLOCK),)
    decoded = code.decode(codes, scales)
    for part, found in zip(x.flatten().split(BLOCK), decoded.flatten().split(BLOCK), strict=True):
        values = part.abs().max() * dynamic_values(code.signed)
        nearest = (part[:, None] - values).abs().min(1).values
        torch.testing.assert_close((part - found).abs(), nearest, rtol=1e-5, atol=1e-6 * nearest.max().item())


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED])
def test_zeros_stay_zeros(code):
    x = torch.zeros(2 * BLOCK + 3)
    assert not code.decode(*code.encode(x)).any()
    x[0] = 1e30
    assert code.decode(*code.encode(x)).count_nonzero() == 1


def test_what_is_rounded_once_is_not_rounded_again():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = SIGNED.decode(*SIGNED.encode(x.abs().max() + x))
    torch.testing.assert_close(SIGNED.decode(*SIGNED.encode(once)), once, rtol=1e-6, atol=0)


# --- the optimizers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORIES)
def test_five_steps_a_file_and_five_steps_are_ten_steps(name, dtype, train, through_a_file):
    params, groups = problem(dtype)
    optimizer = FACTORIES[name](groups, 8)
    train(params, optimizer, 5)
    saved = through_a_file({"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    train(params, optimizer, 5, first=5)

    resumed, groups = problem(dtype)
    for p, value in zip(resumed, saved["model"], strict=True):
        p.data.copy_(value)
    other = FACTORIES[name](groups, 32)  # The bits are those of the state.
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, 5, first=5)
    for p, q in zip(params, resumed, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in other.state[q].items())


@pytest.mark.parametrize("name", FACTORIES)
def test_averages_take_a_byte_and_a_scale_for_each_block(name, train):
    params, groups = problem()
    optimizer = FACTORIES[name](groups, 8)
    train(params, optimizer, 1)
    for index, p in enumerate(params):
        each = p.numel() + 4 * -(-p.numel() // BLOCK) if index in LARGE else 4 * p.numel()
        assert bytes_of(optimizer, p) == AVERAGES[name] * each


@pytest.mark.parametrize("name", FACTORIES)
def test_small_parameters_take_the_steps_of_32_bits_and_large_ones_nearly(name, train):
    moves = {}
    for bits in (8, 32):
        params, groups = problem()
        start = [p.detach().clone() for p in params]
        train(params, FACTORIES[name](groups, bits), 12)
        moves[bits] = [p.detach() - q for p, q in zip(params, start, strict=True)]
    for index, (rounded, exact) in enumerate(zip(moves[8], moves[32], strict=True)):
        error = (rounded - exact).norm() / exact.norm()
        assert (0 < error < 0.05) if index in LARGE else error == 0


@pytest.mark.parametrize("factory", [RiemannianAdamW, RiemannianSGD])
def test_elements_without_a_gradient_stand_still(factory):
    """Rounded to anything but zero, their averages would move them."""
    p = torch.zeros(SMALLEST, requires_grad=True)
    optimizer = factory([p], lr=1.0, state_bits=8, **({"momentum": 0.9} if factory is RiemannianSGD else {}))
    for _ in range(3):
        p.grad = (torch.arange(SMALLEST) % 2).float()
        optimizer.step()
    assert not p.detach()[::2].any()
    assert p.detach()[1::2].all()


def test_no_step_is_longer_than_exact_averages_allow():
    """Squares of small gradients are rounded to zero beside large ones; what divides by them must not be."""
    p = torch.zeros(SMALLEST, requires_grad=True)
    optimizer = RiemannianAdamW([p], lr=1.0, state_bits=8)
    large = torch.arange(SMALLEST) % 2 == 0
    for _ in range(50):
        p.grad = torch.where(large, 1.0, 1e-4)
        optimizer.step()
    assert not optimizer.state[p]["exp_avg_sq"][~large].any()
    before = p.detach().clone()
    p.grad = torch.where(large, 1.0, 0.0)
    optimizer.step()
    move = (p.detach() - before).abs()
    assert move[~large].min() > 0.5
    assert move[~large].max() < 7.3 * (1 - 0.999**51) ** 0.5 / (1 - 0.9**51)


def test_bits_of_a_group_can_be_changed_during_training(train):
    params, groups = problem()
    optimizer = FACTORIES["two_sided"](groups, 32)
    train(params, optimizer, 2)
    for bits, dtype in ((8, torch.uint8), (32, torch.float32)):
        for group in optimizer.param_groups:
            group["state_bits"] = bits
        train(params, optimizer, 1, first=2)
        assert optimizer.state[params[0]]["exp_avg"].dtype == dtype
        assert ("exp_avg_scales" in optimizer.state[params[0]]) == (bits == 8)


def test_betas_without_a_bound_are_taken_as_they_are(train):
    params, groups = problem()
    optimizer = RiemannianAdamW(groups, lr=1e-2, betas=(0.9, 0.0), state_bits=8)
    train(params, optimizer, 3)
    assert all(p.isfinite().all() for p in params)


def test_averages_that_nobody_updates_are_left_as_they_are():
    state = {"exp_avg": torch.ones(SMALLEST)}
    with exact_averages([state], {"exp_avg": SIGNED}, 32) as (found,):
        assert found[0] is state["exp_avg"]


# --- refusals


@pytest.mark.parametrize("bits", [4, 16, None, "8"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=rf"state_bits is {bits}; it must be 8 or 32\."):
        RiemannianAdamW(problem()[1], state_bits=bits)


def test_double_precision_is_refused():
    with pytest.raises(ValueError, match=r"state_bits is 8, but L of pair 0 in group 0 is torch\.float64.*at 32"):
        RiemannianAdamW(problem(torch.float64)[1], state_bits=8)


def test_sharded_parameters_are_refused_also_where_a_wrapper_puts_them(tmp_path):
    params, groups = problem()
    optimizer = RiemannianAdamW(groups, state_bits=8)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [distribute_tensor(p.detach(), mesh, [Replicate()]).requires_grad_() for p in params[:2]]
        with pytest.raises(ValueError, match=r"L of pair 0 in group 0 is sharded, and blocks are not\. Leave"):
            RiemannianAdamW([{"params": sharded, "paired": True}], state_bits=8)
        optimizer.param_groups[0]["params"][:2] = sharded
        with pytest.raises(ValueError, match="L of pair 0 in group 0 is sharded"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
