"""Sharded factors: FSDP2 and tensor parallelism hand the optimizers DTensors, of which each rank holds a part.

Elementwise work runs on `local` parts. Products with r x r matrices run on stacks of DTensors, so that one collective
serves many pairs. A Gram is small and ends up whole on every rank.
"""

from typing import TypeGuard

import torch
from torch import Tensor

# Some builds of torch come without it; then there is nothing that could be sharded.
DISTRIBUTED = torch.distributed.is_available()
if DISTRIBUTED:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether x is a DTensor."""
    return DISTRIBUTED and isinstance(x, DTensor)


def placement_of(x: Tensor) -> tuple[object, ...]:
    """Something hashable that is equal for tensors which lie in the same way on the same devices."""
    return (x.device, x.device_mesh, x.placements) if is_sharded(x) else (x.device,)


def local(x: Tensor) -> Tensor:
    """The part of x on this rank, sharing its memory; x itself if it is not sharded."""
    return x.to_local() if is_sharded(x) else x


def sharded_like(part: Tensor, x: Tensor) -> Tensor:
    """The tensor of x's shape and sharding of which `part` lies on this rank."""
    if not is_sharded(x):
        return part
    return DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def replicated(x: Tensor) -> Tensor:
    """The whole of x, on every rank."""
    return x.full_tensor() if is_sharded(x) else x


def replicate_beside(matrix: Tensor, x: Tensor) -> Tensor:
    """`matrix`, equal on all ranks, as an operand for x."""
    if not is_sharded(x):
        return matrix
    return DTensor.from_local(matrix, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def placed_like(y: Tensor, x: Tensor) -> Tensor:
    """y, sharded as x is."""
    return y.redistribute(placements=x.placements) if is_sharded(x) and is_sharded(y) else y


def sum_over_shards(part: Tensor, x: Tensor) -> Tensor:
    """Sum of what the ranks computed from their parts of x; copies of one part count once."""
    if not is_sharded(x):
        return part
    placements = [Partial() if isinstance(p, Shard) else Replicate() for p in x.placements]
    return DTensor.from_local(part, x.device_mesh, placements, run_check=False).full_tensor()


def true_on_any_rank(flags: Tensor, tensors: list[Tensor]) -> Tensor:
    """flags [n] bool, or-ed over the ranks that share one of the n tensors."""
    for mesh in {x.device_mesh for x in tensors if is_sharded(x)}:
        counts = DTensor.from_local(flags.float(), mesh, [Partial("max")] * mesh.ndim, run_check=False)
        flags = counts.full_tensor() > 0
    return flags
