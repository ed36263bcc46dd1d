"""Passes over a few batches that show in what order a model runs, and which of its blocks can run by themselves."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from hf_lrq.calibration.blocks import Stack
from hf_lrq.calibration.calls import Call, Chain, Outputs, leaves, outputs_of
from hf_lrq.calibration.capture import ModelRunner
from hf_lrq.work import Site


@dataclass
class Section:
    """What is calibrated together: all blocks of a stack, one by one, or the targets that lie between stacks.

    Attributes:
        stack: None for targets outside all stacks.
        targets: name of the block ("" outside of stacks) -> its targets, in the order of execution.
        obstacle: why the blocks cannot run by themselves, or None.
        chains: for each kind of batch, how the blocks follow each other.
        stop_early: whether each target is called once in a pass, which can then end at the last one.
    """

    stack: Stack | None
    targets: dict[str, list[Site]] = field(default_factory=dict)
    obstacle: str | None = None
    chains: dict[tuple[str, ...], list[Chain]] = field(default_factory=dict)
    stop_early: bool = False


class Probe:
    """Passes over one batch of each kind, which show in what order a model runs, and which blocks can be replayed.

    Attributes:
        order: names of blocks and targets, by their first call.
        calls: of each, most in one pass.
    """

    def __init__(self, runner: ModelRunner, stacks: Sequence[Stack], targets: Sequence[Site]):
        self._runner, self._stacks, self._targets = runner, stacks, targets
        self._obstacles: dict[int, str] = {}
        self._chains: dict[int, dict[tuple[str, ...], list[Chain]]] = {}
        self.order: list[str] = []
        self.calls: Counter[str] = Counter()

    def run(self) -> None:
        """Run the passes, in the calling thread."""
        kinds: dict[tuple[str, ...], int] = {}
        for index in range(len(self._runner)):
            kinds.setdefault(self._runner.signature(index), index)
        # The kind with the most inputs goes first: what only it reaches (an image tower) runs before the rest.
        for kind, index in sorted(kinds.items(), key=lambda item: -len(item[0])):
            self._pass(kind, index)

    def _pass(self, kind: tuple[str, ...], index: int) -> None:
        calls: Counter[str] = Counter()

        def count(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                calls[name] += 1
                if name not in self.order:
                    self.order.append(name)

            return hook

        watchers = [_StackWatcher(stack, count) for stack in self._stacks]
        handles = [
            self._runner.model.get_submodule(target.name).register_forward_pre_hook(count(target.name))
            for target in self._targets
        ]
        try:
            for watcher in watchers:
                watcher.__enter__()
            with _Lineage(watchers):
                self._runner.run(index)
        finally:
            for watcher in watchers:
                watcher.__exit__(None, None, None)
            for handle in handles:
                handle.remove()
        self.calls |= calls
        for position, watcher in enumerate(watchers):
            if watcher.obstacle is not None:
                self._obstacles.setdefault(position, watcher.obstacle)
            self._chains.setdefault(position, {})[kind] = watcher.chain

    def sections(self) -> list[Section]:
        """All targets in sections, in the order in which the model reaches them; what it never reaches comes last."""
        homes: dict[str, tuple[int, str]] = {}
        for target in self._targets:
            for position, stack in enumerate(self._stacks):
                if (block := stack.block_of(target.name)) is not None:
                    homes[target.name] = (position, block)
        block_stacks = {block: position for position, stack in enumerate(self._stacks) for block in stack.blocks}
        by_name: dict[str, list[Site]] = {}
        for target in self._targets:
            by_name.setdefault(target.name, []).append(target)

        sections: list[Section] = []
        of_stack: dict[int, Section] = {}
        for name in self.order:
            if name in block_stacks:
                position = block_stacks[name]
                if position not in of_stack:
                    of_stack[position] = Section(
                        self._stacks[position],
                        obstacle=self._obstacles.get(position),
                        chains=self._chains[position],
                    )
                    sections.append(of_stack[position])
                of_stack[position].targets.setdefault(name, [])
            elif name not in homes:
                if not sections or sections[-1].stack is not None:
                    sections.append(Section(None, {"": []}))
                sections[-1].targets[""] += by_name.pop(name)
        never = Section(None, {"": []})
        for name, targets in by_name.items():
            position, block = homes.get(name, (-1, ""))
            home = of_stack.get(position)
            found = home.targets.get(block, never.targets[""]) if home is not None else never.targets[""]
            found += targets
        for section in sections:
            section.stop_early = all(self.calls[t.name] == 1 for targets in section.targets.values() for t in targets)
        return [*sections, never] if never.targets[""] else sections


class _StackWatcher:
    """Hooks on the blocks of one stack in a probing pass."""

    def __init__(self, stack: Stack, count: Callable[[str], Callable[..., None]]):
        self._stack, self._count = stack, count
        self._handles: list[RemovableHandle] = []
        self._previous: Outputs = {}
        self._called: list[str] = []
        self._inputs: list[tuple[Tensor, int]] = []  # Of the block that runs, with their versions.
        self._outputs: list[tuple[Tensor, int]] = []  # Of the block before.
        self._constants: list[tuple[str, Tensor, int]] = []
        self._made_from: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.depth = 0
        self.obstacle: str | None = None
        self.chain: list[Chain] = []

    def __enter__(self) -> "_StackWatcher":
        for name, block in self._stack.blocks.items():
            self._handles += [
                block.register_forward_pre_hook(self._count(name)),
                block.register_forward_pre_hook(self._before(name), with_kwargs=True),
                block.register_forward_hook(self._after(name)),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for name, tensor, version in self._constants:
            if tensor._version != version:
                self._object(f"an argument of {name} is written to later in the pass")

    def comes_from_blocks(self, tensor: Tensor) -> bool:
        """Whether a tensor is an output of a block, or was made from one outside of the blocks."""
        return self._made_from.get(id(tensor)) is tensor

    def follow(self, tensor: Tensor) -> None:
        """Note that a tensor was made from outputs of the blocks."""
        self._made_from[id(tensor)] = tensor

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.depth += 1
            call = Call.of(args, kwargs, self._previous)
            if name in self._called:
                self._object(f"{name} is called more than once in a pass")
            for path, leaf in leaves(call.arguments):
                if isinstance(leaf, Tensor) and self.comes_from_blocks(leaf):
                    argument = path[1] if path[0] else f"number {path[1]}"
                    self._object(f"argument {argument} of {name} is made from outputs of earlier blocks")
            if any(tensor._version != version for tensor, version in self._outputs):
                self._object(f"outputs of the block before {name} are written to")
            self._called.append(name)
            self.chain.append(call.chain)
            self._inputs = [(leaf, leaf._version) for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            constants = (leaf for _, leaf in leaves(call.arguments) if isinstance(leaf, Tensor))
            self._constants += [(name, leaf, leaf._version) for leaf in constants]

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.depth -= 1
            if any(tensor._version != version for tensor, version in self._inputs):
                self._object(f"{name} writes into its inputs")
            self._previous = outputs_of(output)
            self._outputs = [(tensor, tensor._version) for tensor in self._previous.values()]
            self._inputs = []
            for tensor in self._previous.values():
                self.follow(tensor)

        return hook

    def _object(self, reason: str) -> None:
        self.obstacle = self.obstacle or reason


class _Lineage(TorchFunctionMode):
    """Follows what is made, outside of blocks, from the outputs of blocks."""

    def __init__(self, watchers: Sequence[_StackWatcher]):
        super().__init__()
        self._watchers = watchers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outside = [watcher for watcher in self._watchers if watcher.depth == 0]
        if outside:
            inputs = [leaf for _, leaf in leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
            made = [leaf for _, leaf in leaves(result) if isinstance(leaf, Tensor)]
            if result is None and inputs:  # x[...] = y
                made = inputs[:1]
            for watcher in outside:
                if any(watcher.comes_from_blocks(tensor) for tensor in inputs):
                    for tensor in made:
                        watcher.follow(tensor)
        return result
