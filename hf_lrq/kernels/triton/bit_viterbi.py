# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Nearest paths through a trellis of one weight per step with 16-bit states, on a GPU, in exact integers.

A state is a window of 16 bits, newest highest. State s follows the 2**BITS states ((s << BITS) & 0xffff) | d, which
depend on its low 16 - BITS bits only, its group: a step finds the best d of every group, then the cost of every state.
A candidate is one 32-bit number, 2**BITS * cost + d: one minimum finds both and breaks ties towards the smallest d.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STATES = tl.constexpr(1 << 16)
_BYTES = 1 << 30  # of back pointers at a time


@triton.jit
def _step(
    points_ptr, norms_ptr, x_ptr, cost_ptr, next_ptr, back_ptr, step, start,
    FROM_START: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One step of one sequence: costs of all states from cost to next, and back, the best d of every group.

    Returns the least of the new costs.
    """
    groups: tl.constexpr = STATES >> BITS
    x = tl.load(x_ptr + step).to(tl.int32)
    branch = tl.arange(0, 1 << BITS)
    least = tl.full((CHUNK,), 0x7FFFFFFF, tl.int32)
    for first in range(0, groups, CHUNK):
        group = first + tl.arange(0, CHUNK)
        before = (group << BITS)[:, None] | branch[None, :]
        cost = tl.load(cost_ptr + before)
        if FROM_START:
            # More than any path costs, and little enough for 32 bits.
            cost = tl.where(before == start, 0, 1 << 26)
        best = tl.min((cost << BITS) + branch[None, :], axis=1)
        tl.store(back_ptr + group, (best & ((1 << BITS) - 1)).to(tl.uint8))
        state = group[:, None] + (branch * groups)[None, :]
        metric = tl.load(norms_ptr + state) - tl.load(points_ptr + state).to(tl.int32) * x
        metric += (best >> BITS)[:, None]
        tl.store(next_ptr + state, metric)
        least = tl.minimum(least, tl.min(metric, axis=1))
    tl.debug_barrier()
    return tl.min(least, axis=0)


@triton.jit
def _lowered(cost_ptr, least, CHUNK: tl.constexpr):
    """Subtract the least cost from all, which keeps candidates in 32 bits."""
    for first in range(0, STATES, CHUNK):
        place = cost_ptr + first + tl.arange(0, CHUNK)
        tl.store(place, tl.load(place) - least)
    tl.debug_barrier()


@triton.jit
def bit_viterbi_kernel(
    points_ptr, norms_ptr, x_ptr, cost_ptr, back_ptr, out_ptr, steps, window, all_steps,
    BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences). x: [n, steps]; cost: [n, 2, 65536]; back: [n, all_steps, groups]; out: [n, steps]."""
    groups: tl.constexpr = STATES >> BITS
    sequence = tl.program_id(0)
    x_ptr += sequence * steps
    cost_ptr += sequence * (2 * STATES)
    back_ptr += sequence.to(tl.int64) * all_steps * groups
    for first in range(0, STATES, CHUNK):
        tl.store(cost_ptr + first + tl.arange(0, CHUNK), tl.zeros((CHUNK,), tl.int32))
    tl.debug_barrier()
    for t in range(2 * window):
        source = cost_ptr + (t % 2) * STATES
        target = cost_ptr + ((t + 1) % 2) * STATES
        step = (t + steps - window) % steps
        least = _step(
            points_ptr, norms_ptr, x_ptr, source, target, back_ptr + t * groups, step, 0, False, BITS, CHUNK
        )  # fmt: skip
        _lowered(target, least, CHUNK)
    # The smallest state of cost 0.
    seam = tl.zeros((), tl.int32) + STATES
    for first in range(0, STATES, CHUNK):
        state = first + tl.arange(0, CHUNK)
        seam = tl.minimum(seam, tl.min(tl.where(tl.load(cost_ptr + state) == 0, state, STATES)))
    for i in range(window):
        bits = tl.load(back_ptr + (2 * window - 1 - i) * groups + seam % groups).to(tl.int32)
        seam = ((seam << BITS) & (STATES - 1)) | bits
    least = _step(points_ptr, norms_ptr, x_ptr, cost_ptr, cost_ptr + STATES, back_ptr, 0, seam, True, BITS, CHUNK)
    _lowered(cost_ptr + STATES, least, CHUNK)
    for t in range(1, steps):
        source = cost_ptr + (t % 2) * STATES
        target = cost_ptr + ((t + 1) % 2) * STATES
        least = _step(
            points_ptr, norms_ptr, x_ptr, source, target, back_ptr + t * groups, t, 0, False, BITS, CHUNK
        )  # fmt: skip
        _lowered(target, least, CHUNK)
    for i in range(steps):
        t = steps - 1 - i
        tl.store(out_ptr + sequence * steps + t, (seam >> (16 - BITS)).to(tl.uint8))
        seam = ((seam << BITS) & (STATES - 1)) | tl.load(back_ptr + t * groups + seam % groups).to(tl.int32)


def bit_viterbi(points: Tensor, half_norms: Tensor, x: Tensor, bits: int, window: int) -> Tensor:
    """Tail-biting path of least error for every sequence; see `viterbi.viterbi` for the two runs and the ties.

    Args:
        points: [65536] int16, of each window of 16 bits.
        half_norms: [65536] int32.
        x: [n, T] int16, |x| <= 511, T * bits a multiple of 16.
        bits: new bits per step.
        window: steps on each side of the seam, at most T / 2.

    Returns:
        [n, T] uint8, the new bits of each step.
    """
    count, steps = x.shape
    out = torch.empty(count, steps, dtype=torch.uint8, device=x.device)
    all_steps = max(steps, 2 * window)
    groups = 1 << (16 - bits)
    chunk = max(1, _BYTES // (all_steps * groups))
    points, half_norms, x = points.contiguous(), half_norms.contiguous(), x.contiguous()
    for first in range(0, count, chunk):
        part = x[first : first + chunk]
        cost = torch.empty(len(part), 2, 1 << 16, dtype=torch.int32, device=x.device)
        back = torch.empty(len(part), all_steps, groups, dtype=torch.uint8, device=x.device)
        with torch.cuda.device_of(x):
            bit_viterbi_kernel[(len(part),)](
                points, half_norms, part, cost, back, out[first : first + chunk], steps, window, all_steps,
                BITS=bits, CHUNK=groups if triton.knobs.runtime.interpret else 512, num_warps=8,
            )  # fmt: skip
    return out
