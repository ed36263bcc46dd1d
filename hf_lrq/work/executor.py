"""Who carries the work out: the calling thread, or several that compute with one thread each.

The order of a floating-point sum inside a matrix product depends on how many threads share the product. Whole passes
and whole matrices are therefore spread over threads, and nothing inside them is: results do not depend on the number.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")


class Executor(Protocol):
    """Applies a function to many items, some of them at a time.

    Attributes:
        count: items that are worked on side by side.
    """

    @property
    def count(self) -> int: ...

    def map(self, function: Callable[[Item], Result], items: Iterable[Item], one_by_one: bool = False) -> list[Result]:
        """`function` of each item, in the order of the items; the first failure in that order is raised.

        Args:
            function: called without gradients, side by side.
            items: its arguments.
            one_by_one: run each after the one before it.
        """

    def stream(
        self, function: Callable[[Item], Result], items: Iterable[Item], one_by_one: bool = False
    ) -> Iterator[Result]:
        """Like `map`, but each result can be had as soon as it and those before it are there."""


class Inline:
    """Works in the calling thread, item by item."""

    count = 1

    def map(self, function: Callable[[Item], Result], items: Iterable[Item], one_by_one: bool = False) -> list[Result]:
        """See `Executor`."""
        return list(self.stream(function, items))

    def stream(
        self, function: Callable[[Item], Result], items: Iterable[Item], one_by_one: bool = False
    ) -> Iterator[Result]:
        """See `Executor`."""
        for item in items:
            with torch.no_grad():
                result = function(item)
            yield result


class Threads:
    """A pool of threads, without gradients; a context manager that gives the caller's thread setting back.

    Args:
        count: threads; 1 where an accelerator does the work.
    """

    def __init__(self, count: int):
        self.count = count
        self._callers_threads = torch.get_num_threads()
        # The setting is per thread (OpenMP) and global (MKL); a new thread does not inherit the first.
        self._pool = ThreadPoolExecutor(count, "hf_lrq", torch.set_num_threads, (1,))

    @classmethod
    def for_model(cls, model: nn.Module) -> "Threads":
        """As many as the caller's torch.get_num_threads() on a CPU, one on anything else."""
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        return cls(torch.get_num_threads() if on_cpu else 1)

    def __enter__(self) -> "Threads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._callers_threads)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item], one_by_one: bool = False) -> list[Result]:
        """See `Executor`; one by one too, the work is done in a thread of the pool."""
        return list(self.stream(function, items, one_by_one))

    def stream(
        self, function: Callable[[Item], Result], items: Iterable[Item], one_by_one: bool = False
    ) -> Iterator[Result]:
        """See `Executor`."""

        def without_gradients(item: Item) -> Result:
            with torch.no_grad():
                return function(item)

        if one_by_one:
            yield from (self._pool.submit(without_gradients, item).result() for item in items)
            return
        futures = [self._pool.submit(without_gradients, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
