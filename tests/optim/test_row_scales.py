"""Gradients of L scaled by the norms of its rows, as ALLoRA has them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_lrq.optim import factor_pairs, scale_gradients_by_rows
from hf_lrq.optim.row_scales import RowScaledFactor, row_scales


def test_a_row_of_the_gradient_is_divided_by_the_root_of_its_norm(generator: torch.Generator) -> None:
    """1 / sqrt(|L_i| + 1 / eta^2), row by row; and the outputs are what they were."""
    L = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    L[2] = 0
    L.requires_grad_()
    weights = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    view = RowScaledFactor.apply(L, 3.0)
    assert torch.equal(view, L)
    (view * weights).sum().backward()
    for i in range(5):
        scale = 1 / (L[i].detach().square().sum().sqrt() + 1 / 9).sqrt()
        torch.testing.assert_close(L.grad[i], scale * weights[i])
    torch.testing.assert_close(L.grad[2], 3 * weights[2])


def test_scales_are_computed_in_float32() -> None:
    assert row_scales(torch.ones(2, 2, dtype=torch.bfloat16), 1.0).dtype == torch.float32
    assert row_scales(torch.ones(3, 2, 2), 1.0).shape == (3, 2, 1)


@pytest.fixture
def lora(generator: torch.Generator) -> nn.Module:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=3, lora_alpha=3, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    (pair,) = factor_pairs(model)
    return pair.L.grad, pair.R.grad


def test_any_pair_of_a_model_gets_them_until_it_is_switched_off(lora: nn.Module, generator: torch.Generator) -> None:
    """Of PEFT's LoRA as well; R keeps its gradient, and parts of a batch add up."""
    x = torch.randn(4, 6, generator=generator)
    plain_L, plain_R = gradients(lora, x)
    switched = scale_gradients_by_rows(lora, 2.0)
    scaled_L, scaled_R = gradients(lora, x)
    (pair,) = factor_pairs(lora)
    torch.testing.assert_close(scaled_L, plain_L * row_scales(pair.L.detach(), 2.0))
    torch.testing.assert_close(scaled_R, plain_R)
    lora.zero_grad()
    for part in x.split(2):
        lora(part).square().sum().backward()
    torch.testing.assert_close(pair.L.grad, scaled_L)
    switched.remove()
    assert torch.equal(gradients(lora, x)[0], plain_L)


def test_what_cannot_work_is_refused(lora: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"eta must be positive, got 0\. It is the scale of rows that are zero"):
        scale_gradients_by_rows(lora, 0)
    with pytest.raises(ValueError, match="Linear has no trainable floating-point factors"):
        scale_gradients_by_rows(nn.Linear(3, 3))
