"""What the numbers of torch depend on beside their inputs, held fixed while codes and tables are computed.

The user's settings for the products of a model (TF32, bfloat16 inside, autocast, another default dtype or device) are
not to decide over what is stored. Passes of the model itself keep them: they are part of what the model computes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

Restore = Callable[[], None]


class _ProcessWide:
    """Settings that all threads share: the first to come fixes them, the last to go gives the user's back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                with contextlib.ExitStack() as undo:  # Whatever fails half-way is taken back.
                    for fix in (_default_dtype, _determinism, _float32_products):
                        undo.callback(fix())
                    self._undo = undo.pop_all()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo.close()


_process_wide = _ProcessWide()


def _default_dtype() -> Restore:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    return lambda: torch.set_default_dtype(before)


def _determinism() -> Restore:
    """Off, as the flag makes some operations raise and others take another order; ours need neither."""
    if not torch.are_deterministic_algorithms_enabled():
        return lambda: None  # To say so once more would import torch's compiler, which takes seconds.
    before = True, torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    return lambda: torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _float32_products() -> Restore:
    """Products of float32 numbers in float32: no TF32, no bfloat16."""
    undo = contextlib.ExitStack()
    nodes: list[Any] = []
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # torch >= 2.9
        # A node that says "none" asks the one before it, so its own value shows only when that says "none".
        nodes = [backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # The nodes have been set one by one; the older setting then says nothing.
        before = None
    values = []
    for node in nodes:
        values.append(node.fp32_precision)
        node.fp32_precision = "none"
    for node in nodes[2:]:
        node.fp32_precision = "ieee"
    if before is not None:
        torch.set_float32_matmul_precision("highest")
        undo.callback(torch.set_float32_matmul_precision, before)

    def restore() -> None:
        undo.close()
        for node, value in zip(nodes, values, strict=True):
            node.fp32_precision = value

    return restore


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 is what it says, in products too, and nothing on `device` is computed in another dtype or place.

    In a `with`, or around a function as a decorator; in any number of threads. The settings that torch keeps for the
    whole process (precision of float32 products, default dtype, deterministic algorithms) come back when the last
    thread has left, so a model that another thread runs meanwhile is computed with them, too.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process_wide)
        for kind in {"cpu", device.type} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # Not always: it slows every call of torch.
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def fixed_numerics(device: torch.device) -> Iterator[None]:
    """`full_precision`, and products and factorisations on a CPU by one thread.

    The order in which several add up depends on how many they are, and the last digits on the order: near a tie, so
    would the codes. Many matrices at a time, one per thread, is also the faster way to use a processor.
    """
    with full_precision(device):
        threads = torch.get_num_threads()
        if device.type != "cpu" or threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
