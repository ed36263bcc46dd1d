"""Passes over a few batches that show in what order a model runs, and which of its blocks can run by themselves."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_lrq.calibration.blocks import Stack
from hf_lrq.calibration.calls import Call, Outputs, Step, leaves, outputs_of, stand_in_for
from hf_lrq.calibration.capture import Hooked, ModelRunner
from hf_lrq.calibration.recorder import StackRecorder
from hf_lrq.work import Site


@dataclass
class Section:
    """What is calibrated together: all blocks of a stack, one by one, or the sites that lie between stacks.

    Attributes:
        stack: None for sites outside all stacks.
        sites: name of the block ("" outside of stacks) -> its sites, in the order of execution.
        obstacle: why the blocks cannot run by themselves, or None.
        steps: for each kind of batch, how the blocks follow each other.
        stop_early: whether each site is called once in a pass, which can then end at the last one.
    """

    stack: Stack | None
    sites: dict[str, list[Site]] = field(default_factory=dict)
    obstacle: str | None = None
    steps: dict[tuple[str, ...], list[Step]] = field(default_factory=dict)
    stop_early: bool = False


class Probe:
    """Passes over one batch of each kind, which show in what order a model runs, and which blocks can be replayed.

    Attributes:
        order: names of blocks and sites, by their first call.
        calls: name -> how often it is called in a pass, at most.
    """

    def __init__(self, runner: ModelRunner, stacks: Sequence[Stack], sites: Sequence[Site]):
        self._runner, self._stacks, self._sites = runner, stacks, sites
        self._obstacles: dict[int, str] = {}
        self._steps: dict[int, dict[tuple[str, ...], list[Step]]] = {}
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
            self._runner.model.get_submodule(site.name).register_forward_pre_hook(count(site.name))
            for site in self._sites
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
            self._steps.setdefault(position, {})[kind] = self._checked(watcher, index)

    def _checked(self, watcher: "_StackWatcher", index: int) -> list[Step]:
        """The steps of a stack, with stand-ins only if a pass with them shows the very calls that were seen."""
        steps = watcher.steps
        if watcher.obstacle is not None or not steps:
            return steps
        with StackRecorder(watcher.called) as recorder:
            found = recorder.sketch(self._runner, index, steps)
        same = found is not None and all(map(Call.same, found, watcher.calls))
        return steps if same else [Step(step.chain) for step in steps]

    def sections(self) -> list[Section]:
        """All sites in sections, in the order in which the model reaches them; what it never reaches comes last."""
        homes: dict[str, tuple[int, str]] = {}
        for site in self._sites:
            for position, stack in enumerate(self._stacks):
                if (block := stack.block_of(site.name)) is not None:
                    homes[site.name] = (position, block)
        block_stacks = {block: position for position, stack in enumerate(self._stacks) for block in stack.blocks}
        by_name: dict[str, list[Site]] = {}
        for site in self._sites:
            by_name.setdefault(site.name, []).append(site)

        sections: list[Section] = []
        of_stack: dict[int, Section] = {}
        for name in self.order:
            if name in block_stacks:
                position = block_stacks[name]
                if position not in of_stack:
                    of_stack[position] = Section(
                        self._stacks[position],
                        obstacle=self._obstacles.get(position),
                        steps=self._steps[position],
                    )
                    sections.append(of_stack[position])
                of_stack[position].sites.setdefault(name, [])
            elif name not in homes:
                if not sections or sections[-1].stack is not None:
                    sections.append(Section(None, {"": []}))
                sections[-1].sites[""] += by_name.pop(name)
        never = Section(None, {"": []})
        for name, sites in by_name.items():
            position, block = homes.get(name, (-1, ""))
            home = of_stack.get(position)
            found = home.sites.get(block, never.sites[""]) if home is not None else never.sites[""]
            found += sites
        for section in sections:
            section.stop_early = all(self.calls[t.name] == 1 for sites in section.sites.values() for t in sites)
        return [*sections, never] if never.sites[""] else sections


class _StackWatcher(Hooked):
    """Hooks on the blocks of one stack in a probing pass."""

    def __init__(self, stack: Stack, count: Callable[[str], Callable[..., None]]):
        self._stack, self._count = stack, count
        super().__init__()
        self._previous: Outputs = {}
        self._stand_ins: list[Any] = []
        self._told = False  # Whether a block tells another something beside its outputs.
        self._inputs: list[tuple[Tensor, int]] = []  # What the running block got, with versions.
        self._outputs: list[tuple[Tensor, int]] = []  # What the block before returned.
        self._constants: list[tuple[str, Tensor, int]] = []
        self._made_from: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._made_inside: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.depth = 0
        self.obstacle: str | None = None
        self.called: dict[str, nn.Module] = {}
        self.calls: list[Call] = []

    def __enter__(self) -> "_StackWatcher":
        for name, block in self._stack.blocks.items():
            self._handles += [
                block.register_forward_pre_hook(self._count(name)),
                block.register_forward_pre_hook(self._before(name), with_kwargs=True),
                block.register_forward_hook(self._after(name), with_kwargs=True),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for name, tensor, version in self._constants:
            if tensor._version != version:
                self._object(f"an argument of {name} is written to later in the pass")

    @property
    def steps(self) -> list[Step]:
        """How the blocks followed each other; those before one that has to run have to run, too."""
        must = [place for place, found in enumerate(self._stand_ins[:-1]) if found is None or self._told]
        stand_ins = [None if place <= max(must, default=-1) else found for place, found in enumerate(self._stand_ins)]
        return [Step(call.chain, stand_in) for call, stand_in in zip(self.calls, stand_ins, strict=True)]

    def comes_from_blocks(self, tensor: Tensor) -> bool:
        """Whether a tensor is an output of a block, or was made from one outside of the blocks."""
        return self._made_from.get(id(tensor)) is tensor

    def follow(self, tensor: Tensor) -> None:
        """Note that a tensor was made inside a block, or outside from outputs of the blocks."""
        (self._made_inside if self.depth else self._made_from)[id(tensor)] = tensor

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.depth += 1
            call = Call.of(args, kwargs, self._previous)
            if name in self.called:
                self._object(f"{name} is called more than once in a pass")
            for path, leaf in leaves(call.arguments):
                self._told = self._told or self._made_inside.get(id(leaf), ...) is leaf
                if isinstance(leaf, Tensor) and self.comes_from_blocks(leaf):
                    argument = path[1] if path[0] else f"number {path[1]}"
                    self._object(f"argument {argument} of {name} is made from outputs of earlier blocks")
            if any(tensor._version != version for tensor, version in self._outputs):
                self._object(f"outputs of the block before {name} are written to")
            self.called[name] = module
            self.calls.append(call)
            self._inputs = [(leaf, leaf._version) for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            constants = (leaf for _, leaf in leaves(call.arguments) if isinstance(leaf, Tensor))
            self._constants += [(name, leaf, leaf._version) for leaf in constants]

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.depth -= 1
            self._stand_ins.append(stand_in_for(output, (args, kwargs)))
            if any(tensor._version != version for tensor, version in self._inputs):
                self._object(f"{name} writes into its inputs")
            self._previous = outputs_of(output)
            self._outputs = [(tensor, tensor._version) for tensor in self._previous.values()]
            self._inputs = []
            for tensor in self._previous.values():
                self._made_from[id(tensor)] = tensor

        return hook

    def _object(self, reason: str) -> None:
        self.obstacle = self.obstacle or reason


class _Lineage(TorchFunctionMode):
    """Follows what is made inside of blocks, and what is made outside of them from their outputs."""

    def __init__(self, watchers: Sequence[_StackWatcher]):
        super().__init__()
        self._watchers = watchers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = [leaf for _, leaf in leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        versions = [_version(tensor) for tensor in inputs]
        result = func(*args, **(kwargs or {}))
        known = {id(tensor) for tensor in inputs}
        made = [leaf for _, leaf in leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in known]
        made += [tensor for tensor, version in zip(inputs, versions, strict=True) if _version(tensor) != version]
        for watcher in self._watchers:
            if watcher.depth or any(watcher.comes_from_blocks(tensor) for tensor in inputs):
                for tensor in made:
                    watcher.follow(tensor)
        return result


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
