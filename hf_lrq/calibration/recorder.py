"""Passes of a model that note how its blocks are called."""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_lrq.calibration.calls import Call, Chain, outputs_of
from hf_lrq.calibration.capture import ModelRunner, StopPass


class StackRecorder:
    """Hooks that note how each block of a stack is called in a pass, and end it after the last.

    Passes may run in several threads.

    Args:
        blocks: name -> module, in the order in which they run.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]):
        self._blocks = blocks
        self._local = threading.local()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "StackRecorder":
        for name, block in self._blocks.items():
            self._handles += [
                block.register_forward_pre_hook(self._before(name), with_kwargs=True),
                block.register_forward_hook(self._after),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def record(self, runner: ModelRunner, index: int, chain: Sequence[Chain]) -> list[Call] | None:
        """One pass over a batch: the calls of all blocks, or of none; None where they do not follow `chain`."""
        local = self._local
        local.names, local.calls, local.previous = [], [], {}
        runner.run(index)
        names, calls = local.names, local.calls
        local.calls = local.previous = None
        if not calls:
            return []
        if names != list(self._blocks) or [call.chain for call in calls] != list(chain):
            return None
        return calls

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._local.names.append(name)
            self._local.calls.append(Call.of(args, kwargs, self._local.previous))

        return hook

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(self._local.names) == len(self._blocks):
            raise StopPass
        self._local.previous = outputs_of(output)


def free(calls: list[Call | None], index: int) -> Call:
    """Take one of the calls out of the list, so that its tensors can go."""
    call = calls[index]
    assert call is not None, "each call is replayed once"
    calls[index] = None
    return call
