"""The Triton backend: compressed layers on NVIDIA GPUs. Importing it compiles nothing and touches no device."""

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch

from hf_lrq.codebooks.nearest import nearest_e8p, nearest_point

__all__ = [
    "bit_viterbi",
    "declines",
    "decode_rows",
    "lrq_linear",
    "lrq_linear_experts",
    "lrq_linear_group",
    "nearest_e8p",
    "nearest_point",
    "status",
    "unavailable",
    "viterbi",
]

OLDEST = (3, 6)  # Earlier compilers are not tested.
OLDEST_DEVICE = (8, 0)  # The first with int8 tensor cores that Triton compiles for.


def _installed() -> str | None:
    """Why Triton cannot be imported, None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    found = version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"Triton {found} is older than {'.'.join(map(str, OLDEST))}"
    return None


if _installed() is None:
    from hf_lrq.kernels.triton.bit_viterbi import bit_viterbi
    from hf_lrq.kernels.triton.linear import declines, decode_rows, lrq_linear, lrq_linear_experts, lrq_linear_group
    from hf_lrq.kernels.triton.viterbi import viterbi


@cache
def unavailable() -> str | None:
    """Why this backend cannot run here at all, None if it can."""
    reason = _installed()
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_DEVICE:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    return None


def status() -> str:
    """One line: what runs, or why nothing can."""
    reason = unavailable()
    if reason is not None:
        return f"unavailable: {reason}"
    return f"Triton {version('triton')} on {torch.cuda.get_device_name()}"
