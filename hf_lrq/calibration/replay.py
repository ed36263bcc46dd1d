"""Running the blocks of a model one at a time, on inputs that were recorded once.

One pass of the model notes how each block is called. Arguments that are outputs of the block before become
placeholders; all others (masks, position embeddings) are kept as they are. From then on the blocks run by themselves:
what a block returns, compressed or not, is the input of the next. This is exact where nothing but identities happens
between the blocks, which a `Probe` finds out.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from hf_lrq.calibration.blocks import Stack
from hf_lrq.calibration.capture import ModelRunner, StopPass
from hf_lrq.work import Site

Path = tuple[Any, ...]  # Of keys and indices, from a nested value to a tensor in it.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # Positional and keyword.
Outputs = dict[Path, Tensor]
Chain = frozenset[tuple[Path, Path]]  # Which arguments of a block are which outputs of the block before.


@dataclass(frozen=True)
class FromPrevious:
    """Stands for an output of the block before."""

    path: Path


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything in nested tuples, lists and mappings that is none of these, with its path."""
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def outputs_of(value: Any) -> Outputs:
    """The tensors that a block returned."""
    return {path: leaf for path, leaf in leaves(value) if isinstance(leaf, Tensor)}


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested value with each leaf changed; containers of other types than these are leaves."""
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    return change(value)


@dataclass(frozen=True, eq=False)
class Call:
    """How a block was called."""

    arguments: Arguments

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], previous: Outputs) -> "Call":
        """With placeholders for the outputs of the block before."""
        paths = {id(tensor): path for path, tensor in previous.items()}

        def placeholder(leaf: Any) -> Any:
            return FromPrevious(paths[id(leaf)]) if id(leaf) in paths else leaf

        return cls((_mapped(args, placeholder), _mapped(kwargs, placeholder)))

    @property
    def chain(self) -> Chain:
        """The placeholders."""
        return frozenset((path, leaf.path) for path, leaf in leaves(self.arguments) if isinstance(leaf, FromPrevious))

    def needed(self, outputs: Outputs) -> Outputs:
        """Those of the outputs of the block before that this call takes."""
        return {path: outputs[path] for _, path in self.chain}

    def run(self, block: nn.Module, previous: Outputs) -> Outputs:
        """Call the block, with the outputs of the one before where they belong."""

        def filled(leaf: Any) -> Any:
            return previous[leaf.path] if isinstance(leaf, FromPrevious) else leaf

        args, kwargs = _mapped(self.arguments, filled)
        return outputs_of(block(*args, **kwargs))


@dataclass
class Group:
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

    def groups(self) -> list[Group]:
        """All targets in groups, in the order in which the model reaches them; what it never reaches comes last."""
        homes: dict[str, tuple[int, str]] = {}
        for target in self._targets:
            for position, stack in enumerate(self._stacks):
                if (block := stack.block_of(target.name)) is not None:
                    homes[target.name] = (position, block)
        block_stacks = {block: position for position, stack in enumerate(self._stacks) for block in stack.blocks}
        by_name: dict[str, list[Site]] = {}
        for target in self._targets:
            by_name.setdefault(target.name, []).append(target)

        groups: list[Group] = []
        of_stack: dict[int, Group] = {}
        for name in self.order:
            if name in block_stacks:
                position = block_stacks[name]
                if position not in of_stack:
                    of_stack[position] = Group(
                        self._stacks[position],
                        obstacle=self._obstacles.get(position),
                        chains=self._chains[position],
                    )
                    groups.append(of_stack[position])
                of_stack[position].targets.setdefault(name, [])
            elif name not in homes:
                if not groups or groups[-1].stack is not None:
                    groups.append(Group(None, {"": []}))
                groups[-1].targets[""] += by_name.pop(name)
        never = Group(None, {"": []})
        for name, targets in by_name.items():
            position, block = homes.get(name, (-1, ""))
            home = of_stack.get(position)
            found = home.targets.get(block, never.targets[""]) if home is not None else never.targets[""]
            found += targets
        for group in groups:
            group.stop_early = all(self.calls[t.name] == 1 for targets in group.targets.values() for t in targets)
        return [*groups, never] if never.targets[""] else groups


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
