"""Searches for trellis paths by the library; codebooks/viterbi.py defines what they find."""

import torch
from torch import Tensor

from hf_lrq.kernels.cpu.library import Library


def viterbi(library: Library, points: Tensor, half_norms: Tensor, x: Tensor, window: int) -> Tensor:
    """`codebooks.viterbi.byte_path`: uint8 [n, T]."""
    n, steps, width = x.shape
    if width not in (2, 4):
        raise ValueError(f"a step of a byte trellis has 2 or 4 weights, got {width}.")
    expect(points, torch.int16, 256, 256, width)
    expect(half_norms, torch.int32, 256, 256)
    _expect_window(window, steps)
    points, half_norms, x = points.contiguous(), half_norms.contiguous(), x.to(torch.int16).contiguous()
    # Rebuilt each time: a thousandth of the search for one matrix, and never stale.
    table = torch.empty(library.viterbi_table_words(width), dtype=torch.int32)
    library.viterbi_table(points.data_ptr(), half_norms.data_ptr(), width, table.data_ptr())
    path = torch.empty(n, steps, dtype=torch.uint8)
    arguments = (table.data_ptr(), x.data_ptr(), n, steps, width, window, path.data_ptr())
    _check(library.viterbi(*arguments, torch.get_num_threads()))
    return path


def bit_viterbi(library: Library, points: Tensor, half_norms: Tensor, x: Tensor, bits: int, window: int) -> Tensor:
    """`codebooks.viterbi.bit_path`: uint8 [n, T]."""
    n, steps = x.shape
    if bits not in (2, 3, 4):
        raise ValueError(f"a bit trellis has 2, 3 or 4 bits a step, got {bits}.")
    expect(points, torch.int16, 65536)
    expect(half_norms, torch.int32, 65536)
    _expect_window(window, steps)
    points, half_norms, x = points.contiguous(), half_norms.contiguous(), x.to(torch.int16).contiguous()
    path = torch.empty(n, steps, dtype=torch.uint8)
    arguments = (points.data_ptr(), half_norms.data_ptr(), x.data_ptr(), n, steps, bits, window, path.data_ptr())
    _check(library.bit_viterbi(*arguments, torch.get_num_threads()))
    return path


def expect(tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raise ValueError unless a tensor has a dtype and shape."""
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}.")


def _expect_window(window: int, steps: int) -> None:
    if not 1 <= window <= steps // 2:
        raise ValueError(f"the window must be 1 to {steps // 2} for sequences of {steps} steps, got {window}.")


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for a search through a trellis.")
