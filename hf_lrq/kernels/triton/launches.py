"""How kernels are launched: block sizes by device and shape, from the tuner's file or from rules."""

from dataclasses import dataclass
from functools import cache

import torch

# Programs per multiprocessor that hide the latency of loads; more splits than that only add partial sums.
_PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class GemvLaunch:
    """Block sizes of `gemv_kernel`.

    Attributes:
        rows: rows of codes per program, a multiple of 128.
        tiles: tiles of 16 columns in flight; divides 16.
        splits: slices of the columns.
        warps: warps per program.
        fused: whether every program prepares the activations of its slice itself, or a launch before does.
    """

    rows: int = 128
    tiles: int = 4
    splits: int = 1
    warps: int = 4
    fused: bool = True


@dataclass(frozen=True)
class DotLaunch:
    """Block sizes of `dot_kernel`.

    Attributes:
        rows: rows of codes per program, a multiple of 16.
        vectors: vectors of digits per program, a power of two, at least 16.
        splits: slices of the columns.
        warps: warps per program.
        stages: depth of the software pipeline.
    """

    rows: int = 128
    vectors: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Shape:
    """What decides a launch.

    Attributes:
        rows, columns: of the layer.
        vectors: tokens times digits.
    """

    rows: int
    columns: int
    vectors: int


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def splits_for(blocks: int, groups: int, device: torch.device) -> int:
    """Slices of the columns such that `blocks` of rows fill the device; each slice a whole number of groups of 256."""
    wanted = -(-_PROGRAMS_PER_PROCESSOR * processors(device) // max(blocks, 1))
    per_split = -(-groups // min(max(wanted, 1), groups, 32))
    return -(-groups // per_split)


def gemv_launch(shape: Shape, device: torch.device) -> GemvLaunch:
    """Launch of the GEMV of one to three tokens."""
    rows = 256 if shape.rows * shape.columns >= 1 << 25 else 128
    groups = -(-shape.columns // 256)
    return GemvLaunch(rows=rows, splits=splits_for(-(-shape.rows // rows), groups, device))


def dot_launch(shape: Shape, device: torch.device) -> DotLaunch:
    """Launch of the tensor-core product."""
    vectors = min(64, max(16, 1 << (shape.vectors - 1).bit_length()))
    groups = -(-shape.columns // 256)
    blocks = -(-shape.rows // 128) * -(-shape.vectors // vectors)
    return DotLaunch(vectors=vectors, splits=splits_for(blocks, groups, device))
