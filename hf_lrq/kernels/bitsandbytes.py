"""Layers in the codebooks of bitsandbytes by the kernels of bitsandbytes, where that is installed.

It makes the weights of Q or, for one token on a GPU, their product with it; rotations, L R and the bias are torch's.
What it computes is compared with the reference before it is used, for each type of device; where it is wrong, a warning
says so once, and torch computes the layers.
"""

import contextlib
import logging
import threading
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from hf_lrq.codebooks import get_codebook
from hf_lrq.codebooks.base import cached_table
from hf_lrq.kernels import reference
from hf_lrq.kernels.backend import Backend
from hf_lrq.kernels.operands import Operands
from hf_lrq.numerics import full_precision

logger = logging.getLogger(__name__)

TYPES = {"bnbnf4": "nf4", "bnbfp4": "fp4"}  # Our name -> theirs.
BLOCKS = tuple(2**power for power in range(5, 13))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the check: three blocks in a row, and more rows than a vector has lanes.
ROWS, COLUMNS, BLOCK, TOKENS = 24, 192, 64, (1, 5)
TOLERANCE = 2e-5  # Of the largest value, in float32; in shorter dtypes, two of their roundings.


class BitsAndBytes(Backend):
    """See `Backend`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: dict[str, str | None] = {}

    def unavailable(self) -> str | None:
        """Why its kernels cannot run here, None if they can. The first call imports it."""
        return _missing()

    def status(self) -> str:
        """One line: its release, or why it is not used."""
        reason = self.unavailable() or self.fault("cpu")
        return f"torch ({reason})" if reason is not None else f"bitsandbytes {version('bitsandbytes')}"

    def declines(self, x: Tensor, layer: Operands, activation: str, /) -> str | None:
        """Why it does not take this call, None if it does."""
        if layer.codebook not in TYPES:
            return f"bitsandbytes has no kernel for codebook {layer.codebook!r}"
        if x.dtype not in DTYPES:
            return f"bitsandbytes has no kernel for x of {x.dtype}"
        if layer.group_size not in BLOCKS or x.shape[-1] % layer.group_size:
            return f"{x.shape[-1]} columns in groups of {layer.group_size} are not whole blocks of bitsandbytes"
        devices = {str(tensor.device) for tensor in (x, layer.weight, layer.scales)}
        if len(devices) > 1:
            return f"the tensors are on {', '.join(sorted(devices))}"
        return self.fault(x.device.type)

    def lrq_linear(self, x: Tensor, layer: Operands, activation: str, /) -> Tensor:
        """`reference.lrq_linear`; for calls that `declines` has nothing against."""
        return reference.lrq_linear(x, layer, times_codes)

    def fault(self, device_type: str) -> str | None:
        """What it computes wrongly on a type of device, None if nothing was found. The first call tries it out."""
        if device_type not in self._faults:
            with self._lock:
                if device_type not in self._faults:
                    self._faults[device_type] = _fault(torch.device(device_type))
        return self._faults[device_type]


@cache
def _missing() -> str | None:
    if find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    try:
        import_module("bitsandbytes")
        _ = torch.ops.bitsandbytes.dequantize_4bit, torch.ops.bitsandbytes.gemv_4bit
    except Exception as error:  # Whatever a library of another compiler or driver stumbles over.
        return f"bitsandbytes cannot be used: {type(error).__name__}: {error}"
    return None


def times_codes(z: Tensor, layer: Operands) -> Tensor:
    """`reference.times_codes`; some rows of Q are decoded at a time."""
    theirs: Any = torch.ops.bitsandbytes
    columns, kind, block = z.shape[-1], TYPES[layer.codebook], layer.group_size
    packed, absmax = layer.weight.contiguous(), layer.scales.float()
    if z.is_cuda and z.numel() == columns:
        shape, table = [len(packed), columns], _table(z.device, torch.float32, layer.codebook)
        y: Tensor = theirs.gemv_4bit(z.view(1, columns), packed.view(-1, 1), shape, absmax.flatten(), table, block)
        return y.view(*z.shape[:-1], len(packed))
    parts = []
    rows = max(reference.TILE_WEIGHTS // columns, 1)
    for codes, scales in zip(packed.split(rows), absmax.split(rows), strict=True):
        shape = [len(codes), columns]
        Q = theirs.dequantize_4bit(codes.view(-1, 1), scales.flatten(), block, kind, shape, z.dtype)
        parts.append(z @ Q.T)
    return torch.cat(parts, dim=-1)


@cached_table
def _table(codebook: str) -> Tensor:
    """The value of each code, [16]."""
    return get_codebook(codebook).decode(torch.arange(16)).flatten()


def _fault(device: torch.device) -> str | None:
    try:
        with contextlib.ExitStack() as stack:
            # The first call may come from anywhere.
            for mode in (
                _disable_current_modes(),
                torch.inference_mode(False),
                torch.no_grad(),
                full_precision(device),
            ):
                stack.enter_context(mode)
            wrong = next((name for name in TYPES for dtype in DTYPES if not _is_right(name, dtype, device)), None)
    except Exception as error:
        reason: str | None = f"the check failed with {type(error).__name__}: {error}"
    else:
        reason = None if wrong is None else f"{TYPES[wrong]} is computed wrongly"
    if reason is not None:
        reason = f"bitsandbytes {version('bitsandbytes')} on {device.type}: {reason}"
        logger.warning("%s. Layers in its codebooks run in torch.", reason)
    return reason


def _is_right(codebook: str, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    # Dtypes are spelled out: a model is loaded with another default.
    numbers: Any = {"generator": generator, "dtype": torch.float32}
    packed = torch.randint(0, 256, (ROWS, COLUMNS // 8, 4), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(ROWS, COLUMNS // BLOCK, **numbers) + 0.5).half()
    empty = (None,) * 7
    layer = Operands(packed.to(device), scales.to(device), *empty, codebook, BLOCK, 8)
    for tokens in TOKENS:
        x = torch.randn(tokens, COLUMNS, **numbers).to(device, dtype)
        exact = reference.lrq_linear(x.float(), layer)
        error = (reference.lrq_linear(x, layer, times_codes).float() - exact).abs().max()
        if not error <= max(TOLERANCE, 2 * torch.finfo(dtype).eps) * exact.abs().max():
            return False
    return True
