"""Blocks run by themselves only where that is exact; everything else is noticed, said, and calibrated all the same."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import compress_model
from hf_lrq.calibration.blocks import find_stacks
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.probe import Probe, Section
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import CompressionReport, excluded, make_plan


def compress(model: nn.Module, batches: Any, spec: CompressionSpec, skip: Sequence[str] = ()) -> CompressionReport:
    return compress_model(model, make_plan(model, spec, excluded(model, skip)), batches)


Between = Callable[[Any, nn.Module, Tensor], tuple[Tensor]]


def faithful(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    return block(x)


def constant_argument(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    return block(x, scale=torch.ones(64) * 2)


def something_between(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    return block(x * 0.5)


def made_from_outputs(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    return block(x, scale=torch.sigmoid(x.mean()))


def decided_by_outputs(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    scale = torch.ones(64)
    scale[:32] = (x.mean() > 0).float()
    return block(x, scale)


def changed_between(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    (y,) = block(x)
    y += 1
    return (y,)


class Writing(nn.Module):
    """A block that writes into its input."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x.mul_(2)
        y: tuple[Tensor] = self.block(x)
        return y


def changed_inside(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    return block(x)


def late_constant(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    if block is model.blocks[0]:
        model.counter = torch.ones(64)
    model.counter += 1
    return block(x, model.counter)


def twice(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    (x,) = block(x)
    return block(x)


def skipping(model: Any, block: nn.Module, x: Tensor) -> tuple[Tensor]:
    if block is model.blocks[0]:
        (model.first,) = block(x)
        return (model.first,)
    (y,) = block(x if block is model.blocks[1] else model.first)
    return (y,)


FAITHFUL = [faithful, constant_argument]
OBSTACLES = {
    something_between: r"argument number 0 of blocks\.1 is made from outputs of earlier blocks",
    made_from_outputs: r"argument scale of blocks\.1 is made from outputs of earlier blocks",
    decided_by_outputs: r"argument number 1 of blocks\.1 is made from outputs of earlier blocks",
    changed_between: r"outputs of the block before blocks\.1 are written to",
    changed_inside: r"blocks\.0 writes into its inputs",
    late_constant: r"an argument of blocks\.0 is written to later in the pass",
    twice: r"blocks\.0 is called more than once in a pass",
    skipping: r"argument number 0 of blocks\.2 is made from outputs of earlier blocks",
}


@pytest.fixture
def make(toy_class: type[nn.Module], make_toy: Callable[..., Any]) -> Callable[[Between], Any]:
    """A toy model that goes from block to block in its own way."""

    def model(between: Between) -> Any:
        toy = make_toy(type("Model", (toy_class,), {"between": between}))
        if between is changed_inside:
            toy.blocks = nn.ModuleList(Writing(block) for block in toy.blocks)
        return toy

    return model


def stack_section(model: nn.Module, batches: list[Any], spec: CompressionSpec) -> Section:
    targets = list(make_plan(model, spec).specs)
    probe = Probe(ModelRunner(model, batches), find_stacks(model, targets), targets)
    with torch.no_grad(), as_for_inference(model):
        probe.run()
    return next(section for section in probe.sections() if section.stack is not None)


@pytest.mark.parametrize("between", FAITHFUL, ids=lambda f: f.__name__)
def test_models_that_only_pass_outputs_on_are_replayed(
    between: Between, make: Callable[[Between], Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    assert stack_section(make(between), tokens, quick).obstacle is None
    assert compress(make(between), tokens, quick).warnings == []


@pytest.mark.parametrize(("between", "reason"), OBSTACLES.items(), ids=[f.__name__ for f in OBSTACLES])
def test_models_that_do_more_are_run_from_their_start(
    between: Between, reason: str, make: Callable[[Between], Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    report = compress(make(between), tokens, quick)
    assert len(report.warnings) == 1
    expected = rf"^The blocks of blocks could not be run one by one \({reason}\): the model was run from its start"
    with pytest.raises(RuntimeError, match=expected):  # For the message when it does not match.
        raise RuntimeError(report.warnings[0])


@pytest.mark.parametrize("between", OBSTACLES, ids=lambda f: f.__name__)
def test_they_are_calibrated_on_what_they_really_see(
    between: Between, make: Callable[[Between], Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    """The Gram decides: compress block by block by hand, and compare."""
    model, by_hand = make(between), make(between)
    report = compress(model, tokens, quick)
    assert all(layer.n_tokens > 0 for layer in report.layers)
    names = list(dict.fromkeys(layer.name.split(".")[:2][-1] for layer in report.layers))
    assert names == ["0", "1", "2", "head"]
    for name in names:
        others = {"0": "blocks.0", "1": "blocks.1", "2": "blocks.2", "head": "head"}
        del others[name]
        compress(by_hand, tokens, quick, skip=list(others.values()))
    for (key, found), expected in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(found, expected), key


def test_batches_that_take_another_way_are_noticed(
    make_toy: Callable[..., Any], toy_class: type[nn.Module], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    class Early(toy_class):  # type: ignore[misc, valid-type]
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for block in self.blocks[: 2 if tokens.shape[1] < 10 else 3]:
                (x,) = block(x)
            return self.head(x)

    report = compress(make_toy(Early), [*tokens, torch.arange(8)], quick)
    (warning,) = report.warnings
    assert "the blocks do not follow each other in the same way for all batches" in warning
    counts = {layer.name: layer.n_tokens for layer in report.layers}
    assert counts["blocks.1.up"] == 248
    assert counts["blocks.2.up"] == 240


class TwoTowers(nn.Module):
    """Pictures reach the first stack, and words the second; words alone do, too."""

    def __init__(self, make_block: Callable[[], nn.Module]):
        super().__init__()
        self.words = nn.ModuleList(make_block() for _ in range(2))
        self.seeing = nn.ModuleList(make_block() for _ in range(2))
        self.embed = nn.Embedding(64, 32)
        self.bridge = nn.Linear(32, 32)

    def forward(self, input_ids: Tensor, picture: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        if picture is not None:
            for block in self.seeing:
                (picture,) = block(picture)
            x = torch.cat((self.bridge(picture), x), 1)
        for block in self.words:
            (x,) = block(x)
        return x


def test_stacks_are_taken_in_the_order_of_execution(
    make_toy: Callable[..., Any], toy_class: type[nn.Module], quick: CompressionSpec, generator: torch.Generator
) -> None:
    block = type(make_toy(toy_class).blocks[0])
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = TwoTowers(block)
    torch.set_rng_state(torch_state)
    ids = torch.arange(40).reshape(2, 20)
    batches = [ids, {"input_ids": ids, "picture": torch.randn(2, 35, 32, generator=generator)}]
    targets = list(make_plan(model, quick).specs)
    probe = Probe(ModelRunner(model, batches), find_stacks(model, targets), targets)
    with torch.no_grad():
        probe.run()
    order = [section.stack.name if section.stack else "outside" for section in probe.sections()]
    assert order == ["seeing", "outside", "words"]
    report = compress(model, batches, quick)
    assert report.warnings == []
    # Words alone skip the stack for pictures; they are no tokens there.
    counts = {layer.name: layer.n_tokens for layer in report.layers}
    assert counts["seeing.0.up"] == counts["bridge"] == 70
    assert counts["words.0.up"] == 40 + 110
    # Records come in the order of the model, not of execution.
    assert next(iter(counts)) == "words.0.up"


def test_blocks_that_are_never_called_are_compressed_without_data(
    make_toy: Callable[..., Any], toy_class: type[nn.Module], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    class Shallow(toy_class):  # type: ignore[misc, valid-type]
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for block in self.blocks[:2]:
                (x,) = block(x)
            return self.head(x)

    report = compress(make_toy(Shallow), tokens, quick)
    assert {layer.name: layer.n_tokens for layer in report.layers}["blocks.2.up"] == 0
    assert report.warnings == ["no calibration token reached blocks.2.up, blocks.2.down: compressed without data."]
