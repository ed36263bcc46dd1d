"""Nearest sequences of a trellis codebook, by dynamic programming (Viterbi, 1967), in exact integer arithmetic.

A path is a closed walk through states: the last state is also the one before the first step (tail-biting), so that no
bits are spent on a start. It is found in two runs. The first one, free at both ends, takes the steps around the seam
and tells the state there; the second one starts from that state and must end in it.

Costs are integers and ties go to the smaller predecessor (at a free end, to the smaller state), so every backend that
takes over an operator of this file returns the same bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 16  # Sequences at a time; one takes half a megabyte a step.
FORBIDDEN = float(2**34)  # Cost of a start elsewhere: more than any path, little enough to stay exact.

torch.library.define("hf_lrq::viterbi", "(Tensor points, Tensor half_norms, Tensor x, int window) -> Tensor")
torch.library.define(
    "hf_lrq::bit_viterbi", "(Tensor points, Tensor half_norms, Tensor x, int bits, int window) -> Tensor"
)


def byte_path(points: Tensor, half_norms: Tensor, x: Tensor, window: int) -> Tensor:
    """Closed walks through 256 states that minimise sum_t (half_norms[p, c] - <points[p, c], x_t>), c following p.

    Args:
        points: [256, 256, V] int16, at most 1020 in size.
        half_norms: [256, 256] int32, below 2**20.
        x: [n, T, V] int16, at most 511 in size.
        window: steps on each side of the seam in the first run, at most T / 2.

    Returns:
        [n, T] uint8: the states.
    """
    result: Tensor = torch.ops.hf_lrq.viterbi(points, half_norms, x, window)
    return result


def bit_path(points: Tensor, half_norms: Tensor, x: Tensor, bits: int, window: int) -> Tensor:
    """Closed walks through 2**16 states that minimise sum_t (half_norms[s_t] - points[s_t] x_t).

    State s_t is the last 16 bits of a stream that grows by `bits` bits a step, the newest most significant.

    Args:
        points: [65536] int16, at most 511 in size.
        half_norms: [65536] int32, below 2**18.
        x: [n, T] int16, at most 511 in size.
        bits: 2, 3 or 4.
        window: see `byte_path`.

    Returns:
        [n, T] uint8: the new bits of each step.
    """
    result: Tensor = torch.ops.hf_lrq.bit_viterbi(points, half_norms, x, bits, window)
    return result


def viterbi(points: Tensor, half_norms: Tensor, x: Tensor, window: int) -> Tensor:
    """The reference of `byte_path`."""
    # Integers below 2**53 in double precision: exact, with products of matrices by a library made for them.
    state = torch.arange(256, device=x.device).repeat_interleave(256)
    # The predecessor in the low digits: one minimum then finds both, and the smaller predecessor of equals.
    table = torch.cat(
        ((256 * half_norms.flatten() + state).unsqueeze(0), -256 * points.flatten(0, 1).T.long())
    ).double()
    return _closed_paths(_ByteTrellis(table), x, window)


def bit_viterbi(points: Tensor, half_norms: Tensor, x: Tensor, bits: int, window: int) -> Tensor:
    """The reference of `bit_path`."""
    table = torch.stack((half_norms.long(), -points.long())).double()
    return _closed_paths(_BitTrellis(table, bits), x.unsqueeze(2), window)


@dataclass(frozen=True, eq=False)
class _ByteTrellis:
    """Each of 256 states follows any of 256.

    Attributes:
        table: [1 + V, 65536] float64; (1, x) times it is 256 * metric + predecessor of every edge.
    """

    table: Tensor
    states = back_states = 256

    def step(self, cost: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Costs [n, 256] after a step with x [n, 1 + V], and the best predecessor of each state."""
        edges = (x @ self.table).view(len(x), 256, 256)
        packed = (edges + 256 * cost.unsqueeze(2)).amin(1)
        return (packed / 256).floor(), packed.remainder(256).to(torch.uint8)

    def predecessor(self, state: Tensor, back: Tensor) -> Tensor:
        """State [n] before `state` [n], with `back` [n, 256] of that step."""
        return back.gather(1, state.unsqueeze(1)).squeeze(1).long()

    def symbol(self, states: Tensor) -> Tensor:
        """What a path adds to its stream."""
        return states


@dataclass(frozen=True, eq=False)
class _BitTrellis:
    """State s follows ((s << bits) & 0xffff) | d: s without its new bits is the group of its predecessors.

    Attributes:
        table: [2, 65536] float64; (1, x) times it is the metric of every state.
    """

    table: Tensor
    bits: int
    states = 65536

    @property
    def back_states(self) -> int:
        """Groups of predecessors."""
        return 2 ** (16 - self.bits)

    def step(self, cost: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Costs [n, 65536] after a step with x [n, 2], and the best predecessor of each group."""
        branches = 2**self.bits
        best = cost[:, ::branches] * branches
        for d in range(1, branches):
            best = torch.minimum(best, cost[:, d::branches] * branches + d)
        return (best / branches).floor().repeat(1, branches) + x @ self.table, best.remainder(branches).to(torch.uint8)

    def predecessor(self, state: Tensor, back: Tensor) -> Tensor:
        """State [n] before `state` [n], with `back` [n, groups] of that step."""
        group = (state & (self.back_states - 1)).unsqueeze(1)
        return (group << self.bits | back.gather(1, group).long()).squeeze(1)

    def symbol(self, states: Tensor) -> Tensor:
        """What a path adds to its stream."""
        return states >> (16 - self.bits)


def _closed_paths(trellis: _ByteTrellis | _BitTrellis, x: Tensor, window: int) -> Tensor:
    """Symbols [n, T] uint8 for x [n, T, V]."""
    paths = []
    for part in x.double().split(CHUNK):
        part = torch.nn.functional.pad(part, (1, 0), value=1.0)
        seam = _run(trellis, part.roll(window, dims=1)[:, : 2 * window], None)[:, window - 1]
        paths.append(trellis.symbol(_run(trellis, part, seam)).to(torch.uint8))
    return torch.cat(paths) if paths else x.new_empty(x.shape[:2], dtype=torch.uint8)


def _run(trellis: _ByteTrellis | _BitTrellis, x: Tensor, seam: Tensor | None) -> Tensor:
    """States [n, T] int64 of the best path; `seam` [n] int64 is where it comes from and ends."""
    n, steps, _ = x.shape
    cost = x.new_zeros(n, trellis.states)
    if seam is not None:
        cost = torch.full_like(cost, FORBIDDEN).scatter_(1, seam.unsqueeze(1), 0)
    back = torch.empty(steps, n, trellis.back_states, dtype=torch.uint8, device=x.device)
    for t in range(steps):
        cost, back[t] = trellis.step(cost, x[:, t])
    state = seam
    if state is None:  # The first of the least.
        state = (cost * trellis.states + torch.arange(trellis.states, device=x.device)).amin(1)
        state = state.remainder(trellis.states).long()
    path = torch.empty(n, steps, dtype=torch.int64, device=x.device)
    for t in range(steps - 1, -1, -1):
        path[:, t] = state
        state = trellis.predecessor(state, back[t])
    return path


torch.library.register_kernel("hf_lrq::viterbi", None, viterbi)
torch.library.register_kernel("hf_lrq::bit_viterbi", None, bit_viterbi)
