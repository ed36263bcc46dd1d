"""Passes of a model that note how its blocks are called, if possible without running them."""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_lrq.calibration.calls import Call, Step, outputs_of, without_values
from hf_lrq.calibration.capture import Hooked, ModelRunner, StopPass
from hf_lrq.errors import CalibrationError


class StackRecorder(Hooked):
    """Notes how each block of a stack is called in a pass, and ends the pass before the last one runs.

    Between the blocks that are recorded, outputs are only handed on. A block can then be left out: outputs without
    values stand in for its own, and the model goes on to the next. Passes may run in several threads.

    Args:
        blocks: name -> module, in the order in which they run.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]):
        self._blocks = blocks
        self._local = threading.local()
        super().__init__()
        self._forwards: dict[str, Any] = {}  # Those that were set on the blocks themselves.

    def __enter__(self) -> "StackRecorder":
        for name, block in self._blocks.items():
            self._handles += [
                block.register_forward_pre_hook(self._before(name), with_kwargs=True),
                block.register_forward_hook(self._after),
            ]
            if "forward" in vars(block):
                self._forwards[name] = vars(block)["forward"]
            vars(block)["forward"] = self._maybe(block.forward)
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for name, block in self._blocks.items():
            del vars(block)["forward"]
            if name in self._forwards:
                vars(block)["forward"] = self._forwards[name]

    def record(self, runner: ModelRunner, index: int, steps: Sequence[Step]) -> list[Call] | None:
        """The calls of all blocks for one batch, or of none; None where they do not follow each other as in `steps`."""
        calls = self.sketch(runner, index, steps)
        return self._pass(runner, index, steps, run_all=True) if calls is None else calls

    def sketch(self, runner: ModelRunner, index: int, steps: Sequence[Step]) -> list[Call] | None:
        """The same from a pass without the blocks that have a stand-in; None also where it cannot be told."""
        try:
            return self._pass(runner, index, steps, run_all=False)
        except CalibrationError:  # Outputs are computed with, and have no values.
            return None

    def _pass(self, runner: ModelRunner, index: int, steps: Sequence[Step], run_all: bool) -> list[Call] | None:
        local = self._local
        local.names, local.calls, local.previous = [], [], {}
        local.stand_ins = [] if run_all else [step.stand_in for step in steps]
        runner.run(index)
        names, calls = local.names, local.calls
        local.calls = local.previous = None
        if not calls:
            return []
        if names != list(self._blocks) or [call.chain for call in calls] != [step.chain for step in steps]:
            return None
        return calls if all(call.has_values for call in calls) else None

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._local.names.append(name)
            self._local.calls.append(Call.of(args, kwargs, self._local.previous))
            if len(self._local.names) == len(self._blocks):
                raise StopPass

        return hook

    def _maybe(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run_or_stand_in(*args: Any, **kwargs: Any) -> Any:
            position = len(self._local.calls) - 1
            stand_ins = self._local.stand_ins
            stand_in = stand_ins[position] if position < len(stand_ins) else None
            return forward(*args, **kwargs) if stand_in is None else without_values(stand_in, (args, kwargs))

        return run_or_stand_in

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._local.previous = outputs_of(output)


def free(calls: list[Call | None], index: int) -> Call:
    """Take one of the calls out of the list, so that its tensors can go."""
    call = calls[index]
    assert call is not None, "each call is replayed once"
    calls[index] = None
    return call
