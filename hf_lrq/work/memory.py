"""The memory of this process: how much it took, and how what was freed goes back to the system."""

import ctypes
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

_LIBC = ctypes.CDLL(None) if os.name == "posix" else None
# Windows has no such module.
_resource: Any = import_module("resource") if find_spec("resource") else None


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
