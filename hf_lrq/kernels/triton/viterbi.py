# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False
"""Nearest paths through a byte-step trellis on a GPU, in exact integers: the bytes of every other encoder.

A candidate is one 32-bit number, 256 * metric + predecessor, so that one minimum finds both and breaks ties towards
the smallest predecessor. The least metric is subtracted after every step, which keeps them in 32 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STATES = tl.constexpr(256)
_BATCH = 4  # sequences per program: they share the loads of the trellis
_BYTES = 1 << 28  # of back pointers at a time


@triton.jit
def _load_x(x_ptr, sequence, known, step, steps, V: tl.constexpr, WIDTH: tl.constexpr):
    return tl.load(x_ptr + (sequence * steps + step) * WIDTH + V, mask=known, other=0).to(tl.int32)


@triton.jit
def _step(
    points_ptr, norms_ptr, x_ptr, cost_ptr, back_ptr, sequence, known, t, step, steps, all_steps, start,
    FROM_START: tl.constexpr, WIDTH: tl.constexpr, BATCH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One step for BATCH sequences: cost [sequences, 256] in place, back [sequences, all_steps, 256] at t."""
    current = tl.arange(0, STATES)
    costs = cost_ptr + sequence[:, None] * STATES
    best = tl.full((BATCH, STATES), 0x7FFFFFFF, tl.int32)
    for first in range(0, STATES, CHUNK):
        previous = first + tl.arange(0, CHUNK)
        branch = previous[:, None] * STATES + current[None, :]  # [CHUNK, 256]
        packed = (tl.load(norms_ptr + branch) * 256 + previous[:, None])[None, :, :]
        cost = tl.load(costs + previous[None, :], mask=known[:, None], other=0)
        if FROM_START:
            cost = cost & 0
        value = packed + cost[:, :, None]
        for v in tl.static_range(WIDTH):
            x = _load_x(x_ptr, sequence, known, step, steps, v, WIDTH)
            point = tl.load(points_ptr + branch * WIDTH + v).to(tl.int32)
            value -= point[None, :, :] * (x * 256)[:, None, None]
        if FROM_START:
            value = tl.where((previous[None, :] == start[:, None])[:, :, None], value, 0x7FFFFFFF)
        best = tl.minimum(best, tl.min(value, axis=1))
    back = back_ptr + (sequence[:, None] * all_steps + t) * STATES + current[None, :]
    tl.store(back, (best & 255).to(tl.uint8), mask=known[:, None])
    metric = best - (best & 255)
    tl.debug_barrier()  # every cost has been read
    tl.store(costs + current[None, :], metric - tl.min(metric, axis=1)[:, None], mask=known[:, None])
    tl.debug_barrier()  # and every new one is there


@triton.jit
def viterbi_kernel(
    points_ptr, norms_ptr, x_ptr, cost_ptr, back_ptr, out_ptr, count, steps, window, all_steps,
    WIDTH: tl.constexpr, BATCH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """x: [count, steps, WIDTH] int16 -> out: [count, steps] uint8; cost, back: see `_step`."""
    sequence = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    known = sequence < count
    state = tl.arange(0, STATES)
    costs = cost_ptr + sequence[:, None] * STATES + state[None, :]
    tl.store(costs, tl.zeros((BATCH, STATES), tl.int32), mask=known[:, None])
    tl.debug_barrier()
    start = tl.zeros((BATCH,), tl.int32)
    for t in range(2 * window):
        step = (t + steps - window) % steps
        _step(points_ptr, norms_ptr, x_ptr, cost_ptr, back_ptr, sequence, known, t, step, steps, all_steps, start,
              False, WIDTH, BATCH, CHUNK)  # fmt: skip
    cost = tl.load(costs, mask=known[:, None], other=0)  # multiples of 256
    seam = (tl.min(cost + state[None, :], axis=1) & 255).to(tl.int32)
    for i in range(window):
        back = back_ptr + (sequence * all_steps + 2 * window - 1 - i) * STATES
        seam = tl.load(back + seam, mask=known, other=0).to(tl.int32)
    _step(points_ptr, norms_ptr, x_ptr, cost_ptr, back_ptr, sequence, known, 0, 0, steps, all_steps, seam,
          True, WIDTH, BATCH, CHUNK)  # fmt: skip
    for t in range(1, steps):
        _step(points_ptr, norms_ptr, x_ptr, cost_ptr, back_ptr, sequence, known, t, t, steps, all_steps, seam,
              False, WIDTH, BATCH, CHUNK)  # fmt: skip
    for i in range(steps):
        t = steps - 1 - i
        tl.store(out_ptr + sequence * steps + t, seam.to(tl.uint8), mask=known)
        back = back_ptr + (sequence * all_steps + t) * STATES
        seam = tl.load(back + seam, mask=known, other=0).to(tl.int32)


def viterbi(points: Tensor, half_norms: Tensor, x: Tensor, window: int) -> Tensor:
    """Tail-biting path of least error for every sequence.

    A free run over 2 * window steps around the seam finds the state there; a run over all steps from and to that state
    follows. The smallest predecessor and, at a free end, the smallest state win ties.

    Args:
        points: [256 previous, 256 current, V] int16, V = 2 or 4.
        half_norms: [256, 256] int32.
        x: [n, T, V] int16, |x| <= 511.
        window: steps on each side of the seam, at most T / 2.

    Returns:
        [n, T] uint8, the states.
    """
    count, steps, width = x.shape
    out = torch.empty(count, steps, dtype=torch.uint8, device=x.device)
    all_steps = max(steps, 2 * window)
    chunk = max(_BATCH, _BYTES // (all_steps * 256))
    points, half_norms, x = points.contiguous(), half_norms.contiguous(), x.contiguous()
    for first in range(0, count, chunk):
        part = x[first : first + chunk]
        cost = torch.empty(len(part), 256, dtype=torch.int32, device=x.device)
        back = torch.empty(len(part), all_steps, 256, dtype=torch.uint8, device=x.device)
        with torch.cuda.device_of(x):
            viterbi_kernel[(-(-len(part) // _BATCH),)](
                points, half_norms, part, cost, back, out[first : first + chunk], len(part), steps, window, all_steps,
                WIDTH=width, BATCH=_BATCH, CHUNK=256 if triton.knobs.runtime.interpret else 16, num_warps=8,
            )  # fmt: skip
    return out
