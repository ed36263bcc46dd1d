"""Correction for compressed blocks: what the Grams are told of the original model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import compress_model
from hf_lrq.calibration.grams import GramStore, of_all_tokens
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import Inline, make_plan

COARSE = {"bits": 2, "rank": 0, "codebook": "int", "rounding": "nearest", "group_size": 32}


class Residual(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


@pytest.fixture
def stack(generator: torch.Generator) -> nn.Module:
    model = nn.Sequential(nn.Sequential(*(Residual() for _ in range(3))))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return model


@pytest.fixture
def batches(generator: torch.Generator) -> list[dict[str, Tensor]]:
    return [{"input": torch.randn(4, 40, 32, generator=generator)} for _ in range(4)]


def of(stack: nn.Module, batches: list[Any], **options: Any) -> nn.Module:
    model = copy.deepcopy(stack)
    spec = CompressionSpec(default=LayerSpec(**COARSE, **options))
    compress_model(model, make_plan(model, spec), batches)
    return model


def error(model: nn.Module, original: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        return sum((model(**b) - original(**b)).square().mean().item() for b in batches)


def test_it_brings_the_outputs_nearer_to_the_original(
    stack: nn.Module, batches: list[Any], rng_untouched: None
) -> None:
    plain, half = of(stack, batches), of(stack, batches, correction=0.5)
    assert error(half, stack, batches) < 0.9 * error(plain, stack, batches)


def test_the_first_block_has_nothing_to_correct(stack: nn.Module, batches: list[Any]) -> None:
    plain, half = of(stack, batches), of(stack, batches, correction=0.5)
    for name, module in plain.named_modules():
        if name.endswith(".up"):
            same = torch.equal(module.weight, half.get_submodule(name).weight)
            assert same == (name == "0.0.up"), name


def test_the_sums_are_of_rows_of_the_same_token(generator: torch.Generator) -> None:
    x, z = (torch.randn(3, 20, 6, generator=generator) for _ in range(2))
    store = GramStore(["a", "b"])
    for index in range(3):
        rows, others = {"a": [x[index]], "b": [x[index, :10]]}, {"a": [z[index]], "b": [z[index, :10]]}
        store.add([rows], [index], Inline(), [of_all_tokens(rows, others)])
    grams, _ = store.finish()
    assert grams["a"].cross is not None
    torch.testing.assert_close(grams["a"].cross, z.flatten(0, 1).T @ x.flatten(0, 1) / 60)
    assert grams["b"].cross is None, "half of the tokens, perhaps not the same ones"
