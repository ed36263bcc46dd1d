"""Updates of 16-bit parameters in float32: what rounding cuts off is kept beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_lrq.optim.sharding import local


@contextmanager
def working_copies(params: list[Tensor], low_bits: list[Tensor] | None) -> Iterator[list[Tensor]]:
    """Local parts to update in place; of 16-bit parameters they are float32 copies, rounded back afterwards.

    What rounding changes is kept as the difference of two float32 bit patterns. It fits 16 bits, so a bfloat16
    parameter and its low bits are a float32 number. So are a float16 one and its low bits down to 1.5e-5; below that
    rounding changes more, and what does not fit, at most 3e-8 in a step, is lost.

    Args:
        params: parameters of one dtype.
        low_bits: int16, what earlier roundings changed; brought up to date. None to lose it.
    """
    values = [local(p) for p in params]
    if not is_16_bit(values[0]):
        yield values
        return
    exact = [value.float() for value in values]
    patterns = [x.view(torch.int32) for x in exact]
    if low_bits is not None:
        torch._foreach_add_(patterns, [low.int() for low in low_bits])
    yield exact
    torch._foreach_copy_(values, exact)
    if low_bits is not None:
        torch._foreach_sub_(patterns, [value.float().view(torch.int32) for value in values])
        # A tie that was rounded down differs by 2^15, one more than fits.
        torch._foreach_clamp_min_(patterns, -(2**15))
        torch._foreach_clamp_max_(patterns, 2**15 - 1)
        torch._foreach_copy_(low_bits, patterns)


def is_16_bit(x: Tensor) -> bool:
    """Whether x is bfloat16 or float16."""
    return x.dtype.itemsize == 2
