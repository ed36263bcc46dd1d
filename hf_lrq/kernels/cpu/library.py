"""The compiled kernels of this process: built or found, loaded, and checked against torch before anybody uses them."""

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lrq.errors import BackendError
from hf_lrq.kernels.cpu import cache
from hf_lrq.kernels.cpu.build import cached_library
from hf_lrq.kernels.cpu.tiers import TIERS

logger = logging.getLogger(__name__)

# Kinds of `floats.h`; a dtype that is not here has no kernel.
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.uint8: 4}

# What the system says about a file system that is mounted noexec, or about a policy.
FORBIDDEN = ("failed to map segment", "Operation not permitted", "Permission denied")

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "hf_lrq_limit_isa": (ctypes.c_int32, (ctypes.c_int32,)),
    "hf_lrq_tier": (ctypes.c_int32, ()),
    "hf_lrq_linear": (ctypes.c_int32, (ctypes.c_char_p, ctypes.c_int64)),
    "hf_lrq_decode": (None, (*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 8, ctypes.c_double)),
    "hf_lrq_decode_uniform": (None, (*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 8, ctypes.c_double)),
    "hf_lrq_nearest_e8p": (
        None,
        (*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32),
    ),
    "hf_lrq_nearest_point": (
        None,
        (*[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32),
    ),
    "hf_lrq_viterbi_table_words": (ctypes.c_int64, (ctypes.c_int32,)),
    "hf_lrq_viterbi_table": (None, (*[ctypes.c_void_p] * 2, ctypes.c_int32, ctypes.c_void_p)),
    "hf_lrq_viterbi": (
        ctypes.c_int32,
        (*[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_int32] * 3, ctypes.c_void_p, ctypes.c_int32),
    ),
    "hf_lrq_bit_viterbi": (
        ctypes.c_int32,
        (*[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_int32] * 3, ctypes.c_void_p, ctypes.c_int32),
    ),
}


@dataclass(frozen=True)
class Library:
    """Functions of the loaded library; see the C files for their arguments."""

    path: Path
    limit_isa: Callable[[int], int]
    tier: Callable[[], int]
    linear: Callable[..., int]
    decode: Callable[..., None]
    decode_uniform: Callable[..., None]
    nearest_e8p: Callable[..., None]
    nearest_point: Callable[..., None]
    viterbi_table_words: Callable[[int], int]
    viterbi_table: Callable[..., None]
    viterbi: Callable[..., int]
    bit_viterbi: Callable[..., int]

    @property
    def tier_name(self) -> str:
        """The instruction set in use."""
        return TIERS[self.tier()]


def open_library(path: Path) -> Library:
    """Load a library that `build` made; one that is of no use is removed, so that the next process builds it again.

    Raises:
        BackendError: if the system cannot load it.
    """
    try:
        handle = ctypes.CDLL(str(path))
        functions = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
            functions[name.removeprefix("hf_lrq_")] = function
    except (OSError, AttributeError) as error:
        if any(words in str(error) for words in FORBIDDEN):
            raise BackendError(f"no program can be run from {path.parent}: {error}. {cache.REMEDY}") from None
        cache.discard(path)
        raise BackendError(
            f"{path} cannot be loaded and was removed: {error}. If this comes again, set CC to another compiler."
        ) from None
    return Library(path, **functions)


def load(check: Callable[[Library], str | None]) -> Library | str:
    """The library of this process or, in words, why there is none.

    Environment: HF_LRQ_CPU_KERNELS=0 turns it off; HF_LRQ_ISA, one of `TIERS`, keeps it from using a higher one; CC
    names the compiler and HF_LRQ_CACHE the directory of what was built.

    Args:
        check: returns what is wrong with a freshly opened library, None if nothing is.
    """
    if os.environ.get("HF_LRQ_CPU_KERNELS") == "0":
        return "HF_LRQ_CPU_KERNELS is 0"
    if os.name != "posix":
        return f"the kernels need a POSIX system, this is {os.name!r}"
    try:
        library = open_library(cached_library())
        library.limit_isa(_tier_limit())
        wrong = check(library)
    except BackendError as error:
        wrong = str(error)
    except Exception as error:  # Whatever a check stumbles over, layers are computed.
        wrong = f"their check failed with {type(error).__name__}: {error}."
    if wrong is not None:
        logger.warning(
            "CPU kernels are off, compressed layers run in torch: %s HF_LRQ_CPU_KERNELS=0 hides this.", wrong
        )
        return wrong
    return library


def _tier_limit() -> int:
    wanted = os.environ.get("HF_LRQ_ISA", TIERS[-1])
    if wanted not in TIERS:
        raise BackendError(f"HF_LRQ_ISA={wanted!r} is unknown. Known: {', '.join(TIERS)}.")
    return TIERS.index(wanted)


class Loader:
    """Loads the library once, when the first thread asks for it."""

    def __init__(self, check: Callable[[Library], str | None]) -> None:
        self._check = check
        self._lock = threading.Lock()
        self._found: Library | str | None = None
        if hasattr(os, "register_at_fork"):  # Where processes do not fork, nothing is to be done.
            os.register_at_fork(after_in_child=self._after_fork)

    def get(self) -> Library | str:
        """The library, or why there is none."""
        found = self._found
        if found is None:
            with self._lock:
                if self._found is None:
                    self._found = load(self._check)
                found = self._found
        return found

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
