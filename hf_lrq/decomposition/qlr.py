"""W ~ Q + L R for one matrix: a schedule of steps, of which the best iterate is kept.

The loss of every iterate is that of the stored, rounded factors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import DampedGram
from hf_lrq.decomposition.lowrank import LowRankSolver
from hf_lrq.decomposition.quantizers import Quantizer
from hf_lrq.decomposition.schedule import Iterate, Problem, Schedule, Stage
from hf_lrq.errors import SpecError
from hf_lrq.matrices import LowRank, Pair, QuantizedMatrix

LEAST_GAIN = 0.005  # Relative; below it another iteration is not worth its time.


@dataclass(frozen=True, eq=False)
class Decomposition:
    """W ~ Q + L R.

    Attributes:
        quantized: Q.
        low_rank: L R.
        trace: relative proxy loss after each iteration; the result is the iterate of the least one.
    """

    quantized: QuantizedMatrix
    low_rank: LowRank
    trace: tuple[float, ...]

    @property
    def proxy_loss(self) -> float:
        """Relative proxy loss of the result."""
        return min(self.trace)

    def dense(self) -> Tensor:
        """Q + L R, [out, in] float32."""
        return self.quantized.dequantize() + self.low_rank.dense()


def decompose(
    W: Tensor,
    gram: DampedGram,
    quantizer: Quantizer,
    solver: LowRankSolver,
    generator: torch.Generator,
    *,
    start: Pair,
    schedule: Schedule,
    output: DampedGram | None = None,
    fit: DampedGram | None = None,
    fit_output: DampedGram | None = None,
) -> Decomposition:
    """Decompose one weight matrix.

    Args:
        W: [out, in] float32.
        gram: second moment of the layer's inputs.
        quantizer: makes Q, which is zero before the first rounding.
        solver: makes and stores L R.
        generator: draws the random starts of large SVDs.
        start: L [out, s] and R [s, in] float32 before the first step; stored where no step refits them.
        schedule: what to do; see `schedule`.
        output: second moment of the gradients at the layer's outputs; see `schedule.Problem`.
        fit, fit_output: what L R are fitted under instead of the Grams; see `metric`.

    Raises:
        SpecError: if the schedule has no stage.
    """
    if not schedule:
        raise SpecError("the schedule has no stage, so there is no iterate to return. Add Stage((Round(),)).")
    problem = Problem(W, gram, quantizer, solver, generator, output, fit, fit_output)
    search = _Search(problem, Iterate(quantizer.zero(W), solver.store(*start), start))
    for stage in schedule:
        search.run(stage)
    return Decomposition(search.best.quantized, search.best.low_rank, tuple(search.trace))


class _Search:
    """The last iterate, the best one, and the losses of all."""

    def __init__(self, problem: Problem, start: Iterate):
        self._problem = problem
        self.last = self.best = start
        self.trace: list[float] = []

    def run(self, stage: Stage) -> None:
        """Repeat the steps of a stage while that pays."""
        idle = 0  # repetitions in a row without a gain worth having
        for _ in range(stage.times):
            at = self.best if stage.from_best else self.last
            for step in stage.steps:
                at = step.apply(self._problem, at)
            idle = 0 if self._gains(at) else idle + 1
            if stage.patience is not None and idle > stage.patience:
                return

    def _gains(self, at: Iterate) -> bool:
        """Rate an iterate; whether it is better than all before by a gain worth having."""
        loss = self._problem.loss(at.dense())
        least = min(self.trace, default=float("inf"))
        # Not <, or a weight that is all zero, or a loss that is infinite, would leave nothing to return.
        if not self.trace or loss < least:
            self.best = at
        self.last = at
        self.trace.append(loss)
        return loss <= least * (1 - LEAST_GAIN)
