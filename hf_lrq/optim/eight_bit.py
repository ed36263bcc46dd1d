"""Running averages in 8 bits between steps: 256 values from 1e-7 to 1, in blocks with a scale each.

Dynamic quantization in blocks (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022, §2): of each decade
below the largest value of a block, the next one down gets half as many values. These are the values and blocks of
bitsandbytes; rounding is in torch, to the nearest on every device, as bitsandbytes' own on CPUs (0.50) has no zero.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_lrq.optim.pairs import ParamGroup, parameter_name
from hf_lrq.optim.sharding import is_sharded

BLOCK = 256  # Elements that share a scale, as in bitsandbytes.
SMALLEST = 4096  # Elements of the smallest parameter whose averages are worth it, as in bitsandbytes.
DECADES = 7
SCALES = "_scales"  # End of the key of a state under which the scales of another key lie.


@dataclass(frozen=True)
class DynamicCode:
    """256 values in [-1, 1], or in [0, 1], and a scale for each block.

    Attributes:
        signed: whether values can be negative.
    """

    signed: bool

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest values: codes [...] uint8, and the largest magnitude of each block, [blocks] float32.

        Args:
            x: [...] float32.
        """
        flat = x.reshape(-1)
        full = len(flat) // BLOCK * BLOCK
        blocks = flat[:full].view(-1, BLOCK)
        rest = flat[full:].view(1, -1)
        parts = [part for part in (blocks, rest) if part.numel()]
        scales = [part.abs().amax(1) for part in parts]
        # A block of zeros has no scale to divide by.
        relative = [part / torch.where(s > 0, s, 1.0)[:, None] for part, s in zip(parts, scales, strict=True)]
        values = dynamic_values(self.signed, x.device)
        codes = torch.bucketize(torch.cat([part.flatten() for part in relative]), (values[1:] + values[:-1]) / 2)
        return codes.to(torch.uint8).view(x.shape), torch.cat(scales)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """[...] float32 of what `encode` returned."""
        values = dynamic_values(self.signed, codes.device)
        flat = values.index_select(0, codes.reshape(-1).int())
        full = len(flat) // BLOCK * BLOCK
        flat[:full].view(-1, BLOCK).mul_(scales[: full // BLOCK, None])
        if full < len(flat):
            flat[full:].mul_(scales[-1])
        return flat.view(codes.shape)


SIGNED, UNSIGNED = DynamicCode(True), DynamicCode(False)


@cache
def dynamic_values(signed: bool, device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008
    """The 256 values, sorted; float32.

    The n-th decade from 1e-7 upwards has 2^n values, twice as many without a sign, in the middle of equal parts; 0 and
    1 are two more.

    >>> dynamic_values(False)[:4].tolist()
    [0.0, 3.249999917897352e-07, 7.749999895168003e-07, 2.125000037267455e-06]
    """
    found = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(DECADES):
        ends = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        positive = 10.0 ** (decade + 1 - DECADES) * (ends[1:] + ends[:-1]) / 2
        found += [positive, -positive] if signed else [positive]
    return torch.cat(found).sort().values.float().to(device)


@contextmanager
def exact_averages(
    states: list[dict[str, Any]], codes: Mapping[str, DynamicCode], bits: int
) -> Iterator[list[list[Tensor]]]:
    """The running averages of some parameters, to be updated in place; what is kept in 8 bits is rounded afterwards.

    Args:
        states: the state of each parameter, which holds every average: as it is, or in 8 bits.
        codes: name of an average -> how it is rounded.
        bits: 8 rounds the averages of parameters that are large enough.

    Yields:
        For each name, an average for each parameter.
    """
    found = [[_read(state, name, code) for state in states] for name, code in codes.items()]
    yield found
    for (name, code), averages in zip(codes.items(), found, strict=True):
        for state, average in zip(states, averages, strict=True):
            if bits == 8 and average.numel() >= SMALLEST:
                state[name], state[name + SCALES] = code.encode(average)
            elif state.pop(name + SCALES, None) is not None:
                state[name] = average


def _read(state: Mapping[str, Any], name: str, code: DynamicCode) -> Tensor:
    scales = state.get(name + SCALES)
    average: Tensor = state[name]
    return average if scales is None else code.decode(average, scales)


def check_averages(groups: list[ParamGroup]) -> None:
    """Complain about parameters whose averages cannot be kept in 8 bits, as their group asks.

    Raises:
        ValueError: naming the first.
    """
    for number, group in enumerate(groups):
        for index, p in enumerate(group["params"] if group["state_bits"] == 8 else ()):
            reason = "sharded, and blocks are not" if is_sharded(p) else f"{p.dtype}, and the averages float32"
            if is_sharded(p) or p.dtype == torch.float64:
                raise ValueError(
                    f"state_bits is 8, but {parameter_name(group, index)} in group {number} is {reason}. "
                    "Leave state_bits at 32."
                )
