"""How a block is called: values from which it can be called again, on other outputs of the block before.

Arguments that are outputs of the block before are placeholders; all others (masks, position embeddings) are kept as
they are. What a block returns, compressed or not, is then the input of the next. This is exact where nothing but
identities happens between the blocks, which a `Probe` finds out. How a block is called can then also be seen without
running the blocks before: tensors without values stand in for their outputs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[Any, ...]  # The keys and indices that lead from a nested value to a tensor in it.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # Positional and keyword.
Outputs = dict[Path, Tensor]
_Literal = bool | int | float | str | None
Chain = frozenset[tuple[Path, Path]]  # Which arguments of a block are which outputs of the block before.


@dataclass(frozen=True)
class FromPrevious:
    """Stands for an output of the block before."""

    path: Path


@dataclass(frozen=True)
class LikeArgument:
    """Stands for a tensor of the shape and dtype of an argument."""

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


def stand_in_for(returned: Any, arguments: Arguments) -> Any:
    """What a block returned, with a `LikeArgument` for each tensor; None if there is anything else in it."""
    likes: dict[Any, LikeArgument] = {}
    for path, leaf in leaves(arguments):
        if isinstance(leaf, Tensor):
            likes.setdefault((leaf.shape, leaf.dtype), LikeArgument(path))

    def like(leaf: Any) -> Any:
        return likes.get((leaf.shape, leaf.dtype), leaf) if isinstance(leaf, Tensor) else leaf

    stand_in = _mapped(returned, like)
    known = all(isinstance(leaf, LikeArgument | None) for _, leaf in leaves(stand_in))
    return stand_in if known else None


def without_values(stand_in: Any, arguments: Arguments) -> Any:
    """What a block might return, as tensors that have a shape and no values (meta tensors)."""
    given = dict(leaves(arguments))

    def empty(leaf: Any) -> Any:
        return torch.empty_like(given[leaf.path], device="meta") if isinstance(leaf, LikeArgument) else leaf

    return _mapped(stand_in, empty)


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

    @property
    def has_values(self) -> bool:
        """Whether no argument was made from a stand-in for outputs."""
        return not any(isinstance(leaf, Tensor) and leaf.is_meta for _, leaf in leaves(self.arguments))

    def same(self, other: "Call") -> bool:
        """Whether all arguments are placeholders for the same outputs, or equal; of unknown types, the same object."""
        mine, others = dict(leaves(self.arguments)), dict(leaves(other.arguments))
        return mine.keys() == others.keys() and all(_same(leaf, others[path]) for path, leaf in mine.items())

    def needed(self, outputs: Outputs) -> Outputs:
        """Those of the outputs of the block before that this call takes."""
        return {path: outputs[path] for _, path in self.chain}

    def run(self, block: nn.Module, previous: Outputs) -> Outputs:
        """Call the block, with the outputs of the one before where they belong."""

        def filled(leaf: Any) -> Any:
            return previous[leaf.path] if isinstance(leaf, FromPrevious) else leaf

        args, kwargs = _mapped(self.arguments, filled)
        return outputs_of(block(*args, **kwargs))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, FromPrevious | _Literal):
        return type(one) is type(other) and bool(one == other)
    return one is other


@dataclass(frozen=True)
class Step:
    """What the batches of one kind have in common at one block.

    Attributes:
        chain: which of its arguments are which outputs of the block before.
        stand_in: for what it returns, so that it need not run to see how the next block is called; or None.
    """

    chain: Chain
    stand_in: Any = None
