"""Searches for nearest lattice points by the library; codebooks/nearest.py defines what they find."""

import torch
from torch import Tensor

from hf_lrq.codebooks.nearest import biases
from hf_lrq.kernels.cpu.library import Library
from hf_lrq.kernels.cpu.paths import expect


def nearest_e8p(library: Library, rows: Tensor, row_of_key: Tensor, x: Tensor) -> Tensor:
    """`codebooks.nearest.e8p_codes`: int64 [n]."""
    expect(rows, torch.uint8, 256, 8)
    expect(row_of_key, torch.int16, 65536)
    expect(x, torch.float32, len(x), 8)
    rows, row_of_key, x = rows.contiguous(), row_of_key.contiguous(), x.contiguous()
    codes = torch.empty(len(x), dtype=torch.int64)
    arguments = (rows.data_ptr(), row_of_key.data_ptr(), x.data_ptr(), len(x), codes.data_ptr())
    library.nearest_e8p(*arguments, torch.get_num_threads())
    return codes


def nearest_point(library: Library, points: Tensor, x: Tensor) -> Tensor:
    """`codebooks.nearest.point_codes`: int64 [n]."""
    expect(points, torch.float32, len(points), 8)
    expect(x, torch.float32, len(x), 8)
    points, x = points.double().contiguous(), x.contiguous()
    bias = biases(points)
    codes = torch.empty(len(x), dtype=torch.int64)
    arguments = (points.data_ptr(), bias.data_ptr(), len(points), x.data_ptr(), len(x), codes.data_ptr())
    library.nearest_point(*arguments, torch.get_num_threads())
    return codes
