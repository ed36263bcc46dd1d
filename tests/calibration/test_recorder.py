"""How blocks are called is found without running them, and is what it is when they run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import compress_model
from hf_lrq.calibration.blocks import find_stacks
from hf_lrq.calibration.calls import Call, Step
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.probe import Probe, Section
from hf_lrq.calibration.recorder import StackRecorder
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import make_plan


class Recording:
    """The calls of the blocks of a stack over batches, and what it took."""

    def __init__(self, runner: ModelRunner, section: Section):
        assert section.stack is not None
        assert section.obstacle is None
        self.runner, self.section, self.blocks = runner, section, section.stack.blocks
        self.ran = 0

    def _count(self, *_: object) -> None:
        self.ran += 1

    def calls(self, stand_ins: bool = True) -> list[list[Call]]:
        """For each batch, one call per block."""
        firsts = [
            next(module for module in block.modules() if not list(module.children())) for block in self.blocks.values()
        ]
        handles = [module.register_forward_hook(self._count) for module in firsts]
        self.ran = 0
        with torch.no_grad(), as_for_inference(self.runner.model), StackRecorder(self.blocks) as recorder:
            found = [
                recorder.record(self.runner, index, self._steps(index, stand_ins)) for index in range(len(self.runner))
            ]
        for handle in handles:
            handle.remove()
        assert None not in found
        return [calls for calls in found if calls]

    def _steps(self, index: int, stand_ins: bool) -> list[Step]:
        steps = self.section.steps[self.runner.signature(index)]
        return steps if stand_ins else [Step(step.chain) for step in steps]


def recordings(model: nn.Module, batches: list[Any], spec: CompressionSpec) -> list[Recording]:
    """For each stack of a model."""
    sites = list(make_plan(model, spec).specs)
    runner = ModelRunner(model, batches)
    probe = Probe(runner, find_stacks(model, sites), sites)
    with torch.no_grad(), as_for_inference(model):
        probe.run()
    return [Recording(runner, section) for section in probe.sections() if section.stack is not None]


def assert_as_when_they_run(recording: Recording, ran: int, sketched: int) -> None:
    """The calls are those of passes in which all blocks run but the last; both ways run so many blocks."""
    found = recording.calls()
    assert recording.ran == sketched
    expected = recording.calls(stand_ins=False)
    assert recording.ran == ran
    for calls, true_calls in zip(found, expected, strict=True):
        assert len(calls) == len(recording.blocks)
        assert all(map(Call.same, calls, true_calls))


def test_recording_runs_no_block_but_those_that_make_something(
    architecture: str,
    make_model: Callable[[str], nn.Module],
    make_inputs: Callable[[str], list[Any]],
    quick: CompressionSpec,
) -> None:
    # The first block of T5 makes the position bias of all.
    made = 4 if architecture == "t5" else 0
    for recording in recordings(make_model(architecture), make_inputs(architecture), quick):
        assert_as_when_they_run(recording, 4 * (len(recording.blocks) - 1), made)


def test_calibration_runs_blocks_for_inputs_and_outputs_only(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    model = make_toy()
    ran = [0, 0, 0]

    def counted(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor) -> Any:
            ran[index] += 1
            return forward(x)

        return run

    for index, block in enumerate(model.blocks):
        block.forward = counted(index, block.forward)
    compress_model(model, make_plan(model, quick), tokens)
    # One batch in the probe; each of three for inputs, for outputs, and to reach the head.
    assert ran == [1 + 3 + 3 + 3, 1 + 3 + 3 + 3, 1 + 3 + 3]


def attention_masks(recording: Recording) -> list[list[Any]]:
    return [[call.arguments[1]["attention_mask"] for call in calls] for calls in recording.calls()]


def test_masks_of_padded_batches_are_theirs_beside_batches_without_padding(
    make_model: Callable[[str], nn.Module], quick: CompressionSpec
) -> None:
    ids = torch.arange(3, 23).reshape(2, 10)
    full, padded = torch.ones(2, 10).long(), torch.tensor([[1] * 10, [0] * 4 + [1] * 6])
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in (full, padded)]
    (recording,) = recordings(make_model("llama"), batches, quick)
    without, masked = attention_masks(recording)
    assert without == [None] * 3
    assert isinstance(masked[0], Tensor)
    assert all(mask is masked[0] for mask in masked)  # Held once.
    assert_as_when_they_run(recording, 4, 0)


def test_masks_that_only_some_blocks_get_and_only_for_long_batches(
    make_model: Callable[[str], nn.Module], quick: CompressionSpec
) -> None:
    """The batch that is probed fits into the sliding window: no block gets a mask there."""
    (recording,) = recordings(make_model("gemma3"), [torch.arange(3, 9), torch.arange(3, 33)], quick)
    short, long = attention_masks(recording)
    assert short == [None] * 3
    assert [mask is None for mask in long] == [True, False, True]
    assert_as_when_they_run(recording, 4, 0)


def numbered(model: Any, block: nn.Module, x: Tensor) -> Any:
    return block(x, 1.0 + list(model.blocks).index(block))


def test_literals_of_its_own_for_each_block(
    make_toy: Callable[..., Any], toy_class: type[nn.Module], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    model = make_toy(type("Model", (toy_class,), {"between": numbered}))
    (recording,) = recordings(model, tokens, quick)
    assert [[call.arguments[0][1] for call in calls] for calls in recording.calls()] == [[1.0, 2.0, 3.0]] * 3
    assert_as_when_they_run(recording, 6, 0)


class Telling(nn.Module):
    """A block that leaves something for the next beside its outputs."""

    def __init__(self, block: nn.Module, told: Tensor):
        super().__init__()
        self.block, self.told = block, told

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor]:
        y: tuple[Tensor] = self.block(x, scale)
        self.told = torch.sigmoid(y[0].mean())
        return y


def told(model: Any, block: nn.Module, x: Tensor) -> Any:
    before = list(model.blocks).index(block) - 1
    return block(x, model.blocks[before].told if before >= 0 else torch.ones(()))


class Counting(nn.Module):
    """A block that counts itself in a list that it is given."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, count: list[int]) -> tuple[Tensor]:
        count[0] += 1
        y: tuple[Tensor] = self.block(x, float(count[0]))
        return y


def counting(model: Any, block: nn.Module, x: Tensor) -> Any:
    if block is model.blocks[0]:
        model.count = [0]
    return block(x, model.count)


def decided(model: Any, block: nn.Module, x: Tensor) -> Any:
    return block(x, 2.0 if x.mean() > 0 else 1.0)


class Wrapped(tuple):  # type: ignore[type-arg]
    """Outputs of a type that nothing is known about."""


class Wrapping(nn.Module):
    """A block that returns them."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Wrapped:
        return Wrapped(self.block(x))


def wrapped(model: Any, block: nn.Module, x: Tensor) -> Any:
    return block(x)


@pytest.mark.parametrize("between", [told, counting, decided, wrapped], ids=lambda f: f.__name__)
def test_blocks_whose_values_matter_are_run(
    between: Any, make_toy: Callable[..., Any], toy_class: type[nn.Module], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    model = make_toy(type("Model", (toy_class,), {"between": between}))
    if between is told:
        model.blocks = nn.ModuleList(Telling(block, torch.ones(())) for block in model.blocks)
    if between in (counting, wrapped):
        kind = Counting if between is counting else Wrapping
        model.blocks = nn.ModuleList(kind(block) for block in model.blocks)
    (recording,) = recordings(model, tokens, quick)
    assert_as_when_they_run(recording, 6, 6)


@pytest.mark.parametrize("made", ["tensor", "literal"])
def test_blocks_are_run_for_a_batch_that_takes_another_way(
    made: str, make_toy: Callable[..., Any], toy_class: type[nn.Module], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    """One way follows the other step by step, but computes with outputs; no batch that was probed shows that."""

    def between(model: Any, block: nn.Module, x: Tensor) -> Any:
        if x.shape[1] == 40:
            return block(x, torch.ones(()))
        return block(x, torch.sigmoid(x.mean()) if made == "tensor" else float(x.mean()))

    model = make_toy(type("Model", (toy_class,), {"between": between}))
    (recording,) = recordings(model, [*tokens, torch.arange(8)], quick)
    assert_as_when_they_run(recording, 8, 2)


def test_blocks_are_as_they_were_afterwards(
    make_toy: Callable[..., Any], tokens: list[Tensor], quick: CompressionSpec
) -> None:
    model = make_toy()
    own = model.blocks[1].forward = model.blocks[1].forward  # As libraries do that wrap what a module computes.
    (recording,) = recordings(model, tokens, quick)
    assert_as_when_they_run(recording, 6, 0)
    assert [vars(block).get("forward") for block in model.blocks] == [None, own, None]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
