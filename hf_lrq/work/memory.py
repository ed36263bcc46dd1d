"""The memory of this process: how much it took, what fits into a budget, and how what was freed goes back."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

_LIBC = ctypes.CDLL(None) if os.name == "posix" else None
# Windows has no such module.
_resource: Any = import_module("resource") if find_spec("resource") else None


def in_groups(items: Iterable[Item], needed: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Items in their order, as many together as take no more bytes than the budget; at least one.

    >>> list(in_groups([3, 4, 9, 1], lambda item: item, 8))
    [[3, 4], [9], [1]]
    """
    group: list[Item] = []
    taken = 0
    for item in items:
        if group and taken + needed(item) > budget:
            yield group
            group, taken = [], 0
        group.append(item)
        taken += needed(item)
    if group:
        yield group


def give_back_freed() -> None:
    """Hand the memory of freed tensors back to the system, where the C library keeps it; elsewhere nothing happens.

    What several threads allocate and free in turn leaves glibc with gaps that are never filled: the resident size grows
    with every pass, though no tensor is kept.
    """
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use so far: allocated on a CUDA device, else resident in this process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _resource is None:
        return None
    # Linux counts in kibibytes, macOS in bytes.
    most: int = _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)
