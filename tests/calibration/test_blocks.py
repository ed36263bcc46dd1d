"""Stacks of blocks are found by structure alone."""

from collections.abc import Callable

import pytest
from torch import nn

from hf_lrq.calibration.blocks import find_stacks, is_stateful
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import excluded, make_plan

STACKS = {
    "llama": {"model.layers": 3},
    "qwen3": {"model.layers": 3},
    "gemma3": {"model.layers": 3},
    "gpt2": {"transformer.h": 3},
    "bert": {"encoder.layer": 3},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "mixtral": {"model.layers": 3},
    "opt": {"model.decoder.layers": 3},
    "vit": {"vit.layers": 3},
}


def stacks_of(model: nn.Module, spec: CompressionSpec, skip: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """Stack -> names of its blocks."""
    found = find_stacks(model, list(make_plan(model, spec, excluded(model, skip)).specs))
    return {stack.name: list(stack.blocks) for stack in found}


def test_stacks_of_known_architectures(
    architecture: str, make_model: Callable[[str], nn.Module], quick: CompressionSpec
) -> None:
    found = stacks_of(make_model(architecture), quick)
    assert {name: len(blocks) for name, blocks in found.items()} == STACKS[architecture]
    for name, blocks in found.items():
        assert blocks == [f"{name}.{index}" for index in range(len(blocks))]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)


class Other(Pair):
    pass


class Third(Pair):
    pass


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # Layers that are matrices themselves are no blocks.
        (nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), {}),
        # Blocks may stand among other modules.
        (nn.Sequential(nn.Embedding(9, 32), Pair(), Pair(), nn.Linear(32, 32)), {"": ["1", "2"]}),
        # Alternating kinds, as in hybrid models.
        (nn.ModuleList([Pair(), Other(), Pair(), Other()]), {"": ["0", "1", "2", "3"]}),
        # Stages that have nothing in common are searched for stacks of their own.
        (nn.Sequential(nn.Sequential(Pair(), Pair()), nn.ModuleList([Other()])), {"0": ["0.0", "0.1"], "1": ["1.0"]}),
        (nn.Sequential(nn.Flatten(), Pair()), {}),
        (nn.ModuleList([Pair(), Other(), Third()]), {}),
        # Lists of lists cannot be called; the inner ones are the stacks.
        (nn.ModuleList([nn.ModuleList([Pair()]), nn.ModuleList([Pair()])]), {"0": ["0.0"], "1": ["1.0"]}),
        # Only the outermost list counts.
        (nn.ModuleDict({"h": nn.ModuleList([nn.Sequential(Pair(), Pair())])}), {"h": ["h.0"]}),
    ],
)
def test_stacks_by_structure(model: nn.Module, expected: dict[str, list[str]], quick: CompressionSpec) -> None:
    assert stacks_of(model, quick) == expected


def test_a_block_without_targets_belongs_to_its_stack(quick: CompressionSpec) -> None:
    model = nn.ModuleList([Pair(), Pair(), Pair()])
    assert stacks_of(model, quick, skip=("1",)) == {"": ["0", "1", "2"]}


def test_block_of_a_module(quick: CompressionSpec) -> None:
    model = nn.ModuleDict({"h": nn.ModuleList(Pair() for _ in range(11))})
    (stack,) = find_stacks(model, list(make_plan(model, quick).specs))
    assert stack.block_of("h.1.one") == "h.1"
    assert stack.block_of("h.10.one") == "h.10"
    assert stack.block_of("h") is None
    assert stack.block_of("head.1.one") is None


def test_a_model_that_changes_itself_in_a_pass_is_seen() -> None:
    model = nn.ModuleList([nn.Linear(8, 8)])
    assert not is_stateful(model)
    model[0].rope_type = "default"
    assert not is_stateful(model)
    model[0].rope_type = "longrope"
    assert is_stateful(model)
    model[0].rope_type = {"full": "default", "sliding": "dynamic"}
    assert is_stateful(model)
