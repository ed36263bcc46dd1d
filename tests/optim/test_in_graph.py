"""Preconditioning inside the graph: gradients are those that the optimizers compute, and the model is as it was."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_lrq.decomposition import compress_matrix
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.optim import (
    RiemannianSGD,
    factor_pairs,
    precondition,
    precondition_gradients,
    precondition_in_graph,
    riemannian_param_groups,
)
from hf_lrq.spec import LayerSpec

DAMPING = 1e-3


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_in_graph_gives_the_preconditioned_gradients_and_an_unchanged_output(generator: torch.Generator) -> None:
    x, y = draw(generator, 5, 9), draw(generator, 5, 7)
    L, R = draw(generator, 7, 3).requires_grad_(), draw(generator, 3, 9).requires_grad_()

    def gradients(L_used: Tensor, R_used: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = x @ (0.5 * L_used @ R_used).T
        return out, torch.autograd.grad((out - y).square().sum(), (L, R))

    plain, raw = gradients(L, R)
    same, preconditioned = gradients(*precondition_in_graph(L, R, 1e-4, scaling=0.5))
    assert torch.equal(same, plain)
    torch.testing.assert_close(preconditioned, precondition(*raw, L, R, 1e-4, scaling=0.5))


def test_in_graph_adds_up_over_micro_batches(generator: torch.Generator) -> None:
    """The preconditioner is linear, so accumulated gradients equal the gradient of the whole batch."""
    x = draw(generator, 8, 9)
    L, R = draw(generator, 7, 3).requires_grad_(), draw(generator, 3, 9).requires_grad_()
    for part in (x, x[:4], x[4:]):
        L_used, R_used = precondition_in_graph(L, R)
        (part @ (L_used @ R_used).T).square().sum().backward()
        if part is x:
            whole = L.grad.clone(), R.grad.clone()
            L.grad = R.grad = None
    torch.testing.assert_close((L.grad, R.grad), whole)


def test_in_graph_trains_one_factor_beside_a_frozen_one(generator: torch.Generator) -> None:
    L, R = draw(generator, 7, 3), draw(generator, 3, 9).requires_grad_()
    L_used, R_used = precondition_in_graph(L, R)
    (L_used @ R_used).square().sum().backward()
    product = 2 * L.T @ (L @ R)
    torch.testing.assert_close(R.grad, precondition(torch.zeros_like(L), product.detach(), L, R.detach())[1])


def test_in_graph_needs_damping(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"damping is 0; it must be positive"):
        precondition_in_graph(draw(generator, 7, 3), draw(generator, 3, 9), 0)


def compressed_layer(generator: torch.Generator, out: int = 24, width: int = 16) -> LRQLinear:
    W = torch.randn(out, width, generator=generator)
    layer = LRQLinear.from_matrix(compress_matrix(W, None, LayerSpec(rank=3, factor_bits=16, iters=1), generator))
    for factor in (layer.lr_L, layer.lr_R):
        factor.data = factor.data.float()
        factor.requires_grad_(True)
    return layer


class Experts(nn.Module):
    """A stack whose experts all see the input."""

    def __init__(self, layer: LRQLinear):
        super().__init__()
        self.stack = LRQExpertStack(2, layer.in_features, layer.out_features, layer.layout)
        for name, p in self.stack.named_parameters():
            p.data = torch.stack([getattr(layer, name).data] * 2)
            p.requires_grad_(name in ("lr_L", "lr_R"))

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x, 0) + 2 * self.stack(x, 1)


def lora(generator: torch.Generator) -> nn.Module:
    plain = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 5))
    model = get_peft_model(plain, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    return model


MODELS: dict[str, Callable[[torch.Generator], nn.Module]] = {
    "layers": lambda g: nn.Sequential(compressed_layer(g), nn.Tanh(), compressed_layer(g, 16, 24)),
    "experts": lambda g: Experts(compressed_layer(g)),
    "lora": lora,
}


def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    return model(torch.randn(6, 16, generator=generator)).square().mean()


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_preconditioned(kind: str, generator: torch.Generator) -> None:
    model = MODELS[kind](generator)
    names = [name for name, _ in model.named_parameters()]
    state = generator.get_state()
    loss(model, generator).backward()
    pairs = factor_pairs(model)
    expected = [precondition(p.L.grad, p.R.grad, p.L.detach(), p.R.detach(), DAMPING, p.scaling) for p in pairs]
    model.zero_grad()
    switched = precondition_gradients(model, DAMPING)
    for count in (1, 2):  # And they add up.
        generator.set_state(state)
        loss(model, generator).backward()
        for pair, (grad_L, grad_R) in zip(pairs, expected, strict=True):
            torch.testing.assert_close(pair.L.grad, count * grad_L, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(pair.R.grad, count * grad_R, rtol=1e-4, atol=1e-6)
    assert [name for name, _ in model.named_parameters()] == names
    switched.remove()
    model.zero_grad()
    generator.set_state(state)
    loss(model, generator).backward()
    assert not torch.allclose(pairs[0].L.grad, expected[0][0])


def test_any_optimizer_takes_the_steps_of_ours(generator: torch.Generator) -> None:
    ours, hooked = (MODELS["layers"](torch.Generator().manual_seed(3)) for _ in range(2))
    precondition_gradients(hooked, DAMPING)
    optimizers = (
        RiemannianSGD(riemannian_param_groups(ours), lr=0.1, damping=DAMPING),
        torch.optim.SGD([p for p in hooked.parameters() if p.requires_grad], lr=0.1),
    )
    for _ in range(3):
        state = generator.get_state()
        for model, optimizer in zip((ours, hooked), optimizers, strict=True):
            generator.set_state(state)
            loss(model, generator).backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_recomputed_activations_change_nothing(generator: torch.Generator) -> None:
    model = MODELS["layers"](generator)
    precondition_gradients(model, DAMPING)
    x = torch.randn(6, 16, generator=generator)
    grads = []
    for run in (model, lambda z: checkpoint(model, z, use_reentrant=False)):
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


def test_an_error_in_between_leaves_the_parameters_in_place(generator: torch.Generator) -> None:
    model = MODELS["layers"](generator)
    precondition_gradients(model, DAMPING)
    with pytest.raises(ValueError, match="takes floating-point inputs of width"):
        model(torch.zeros(2, 3))
    assert isinstance(model[0].lr_L, nn.Parameter)
    assert "lr_L" not in vars(model[0])


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no trainable floating-point factors"):
        precondition_gradients(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="damping is 0"):
        precondition_gradients(nn.Linear(3, 3), 0)
    model = MODELS["layers"](torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="damping is nan"):
        precondition_gradients(model, float("nan"))
    assert not any(module._forward_pre_hooks for module in model.modules())
