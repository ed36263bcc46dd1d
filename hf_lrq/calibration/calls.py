"""How a block is called: values from which it can be called again, on other outputs of the block before.

Arguments that are outputs of the block before are placeholders; all others (masks, position embeddings) are kept as
they are. What a block returns, compressed or not, is then the input of the next. This is exact where nothing but
identities happens between the blocks, which a `Probe` finds out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

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
