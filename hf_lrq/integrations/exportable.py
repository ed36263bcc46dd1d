"""Compressed models that go into a format of others, which knows linear layers alone."""

from collections.abc import Iterator

from torch import nn

from hf_lrq.errors import SpecError
from hf_lrq.nn import COMPRESSED, LRQLinear


def linear_layers(model: nn.Module, taker: str, how: str) -> Iterator[tuple[str, LRQLinear]]:
    """Name and module of each compressed layer, all of which are linear ones.

    Args:
        model: of any kind.
        taker: whose format it is, for messages.
        how: to compress for that format, for messages.

    Raises:
        SpecError: at the first compressed module that is no linear layer; names it. At the end, if there was none.
    """
    found = False
    for name, module in model.named_modules():
        if not isinstance(module, COMPRESSED):
            continue
        found = True
        if not isinstance(module, LRQLinear):
            raise SpecError(f"{name} is {type(module).__name__}; {taker} takes linear layers. Compress with {how}.")
        yield name, module
    if not found:
        raise SpecError(f"this model has no compressed layers. Compress it with {how}.")
