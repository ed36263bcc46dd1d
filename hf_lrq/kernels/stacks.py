"""Tensors that lie one after the other in memory, so that a kernel can take them for one."""

from collections.abc import Sequence

import torch
from torch import Tensor


def side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in one new buffer: contiguous views of it, one after the other.

    Args:
        tensors: tensors of one dtype and device, equal in all axes but the first.
    """
    return list(torch.cat([tensor.detach() for tensor in tensors]).split([len(tensor) for tensor in tensors]))


def can_stand_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether kernels can read them there: one dtype, equal but for the first axis, whole units of 16 bytes."""
    alike = len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) == 1
    return alike and all(tensor.nbytes % 16 == 0 for tensor in tensors)


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """All tensors as one along the first axis, without a copy; None where they do not lie one after the other."""
    first, end = tensors[0], tensors[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        same = (tensor.dtype, tensor.shape[1:], tensor.device) == (first.dtype, first.shape[1:], first.device)
        if not same or not tensor.is_contiguous() or tensor.data_ptr() != end:
            return None
        if tensor.untyped_storage().data_ptr() != storage:  # Neighbours by chance.
            return None
        end += tensor.numel() * tensor.element_size()
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())
