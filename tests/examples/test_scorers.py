"""Other ways to spend a budget: what they predict, and that they find what there is."""

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.spec import LayerSpec
from hf_lrq.work.menus import Menu
from hf_lrq.work.sites import LinearSite

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "scorers.py"
SIZE = 24


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("scorers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # Where the other script is that it imports.
        spec.loader.exec_module(module)
        yield module


def menus(count: int) -> list[Menu]:
    specs = tuple(LayerSpec(codebook="int", bits=bits, rank=0) for bits in (2, 3, 4))
    return [Menu((LinearSite(f"layers.{at}", 256, 256 * (1 + at % 2)),), specs) for at in range(count)]


class Chain(nn.Module):
    """Layers one after the other, and the probabilities of labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False, device="meta") for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.layers[1](self.layers[0](x).tanh()))


@pytest.fixture
def levels(script: ModuleType, generator: torch.Generator) -> Any:
    model = Chain()
    weights = []
    for layer in model.layers:
        layer.weight = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator) / 5)
        errors = [scale * torch.randn(SIZE, SIZE, generator=generator) for scale in (0.01, 0.005, 0.002)]
        weights.append([layer.weight.data + error for error in errors])
    plain = {f"layers.{at}": layer.weight.data for at, layer in enumerate(model.layers)}
    named = [[{f"layers.{at}": weight} for weight in each] for at, each in enumerate(weights)]
    return script.Levels(model, menus(2), named, plain)


def test_errors_of_two_layers_together_are_predicted(
    script: ModuleType, levels: Any, generator: torch.Generator
) -> None:
    batches = [torch.randn(4, 16, SIZE, generator=generator) for _ in range(2)]
    G = script.gram_of_errors(levels, batches)
    fitness = script.Fitness(levels, batches)
    for one, other in itertools.product(range(3), repeat=2):
        at = torch.tensor([one, 3 + other])
        assert G[at][:, at].sum().item() == pytest.approx(fitness((one, other), 2), rel=0.1)
    levels.put_all([None, None])
    assert torch.equal(levels.model.layers[0].weight, levels.plain["layers.0"])


def test_exchanges_and_mutations_find_the_best_of_a_few(script: ModuleType, generator: torch.Generator) -> None:
    found = menus(4)
    A = torch.randn(12, 12, generator=generator)
    G = A @ A.T + 4 * torch.diag(torch.tensor([4.0, 2.0, 1.0] * 4))

    def loss(choices: Any) -> float:
        at = torch.tensor([3 * menu + place for menu, place in enumerate(choices)])
        return G[at][:, at].sum().item()

    def size(choices: Any) -> int:
        return sum(menu.bytes(menu.specs[place]) for menu, place in zip(found, choices, strict=True))

    budget = size((1, 1, 1, 1))
    inside = [choices for choices in itertools.product(range(3), repeat=4) if size(choices) <= budget]
    best, start = min(map(loss, inside)), (1, 1, 1, 1)
    assert loss(start) > best
    exchanged = script.exchanged(start, found, budget, loss)
    assert size(exchanged) <= budget
    assert best <= loss(exchanged) < loss(start)

    class Fitness:
        most = 2

        def __call__(self, choices: Any, count: int) -> float:
            return loss(choices)

    assert script.searched(start, found, budget, Fitness(), 0, seed=0) == list(start)
    searched = script.searched(start, found, budget, Fitness(), 6, seed=0)
    assert size(searched) <= budget
    assert best <= loss(searched) < loss(start)
