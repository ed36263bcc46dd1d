"""The order in which Q and L R are improved, as a value: stages of rounding, sweeping and refitting.

A step improves one half of W ~ Q + L R with the other fixed. A stage repeats its steps while that pays. A schedule is a
tuple of stages; `qlr.decompose` runs it. Published methods are schedules too: see `SCHEDULES`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_lrq.decomposition.gram import DampedGram, marginalise, relative_loss, weighted_square
from hf_lrq.decomposition.lowrank import LowRankSolver, whitened_factors
from hf_lrq.decomposition.quantizers import Quantizer
from hf_lrq.decomposition.row_feedback import quantize_rows, refine_rows
from hf_lrq.errors import SpecError, did_you_mean
from hf_lrq.matrices import LowRank, Pair, QuantizedMatrix

PATIENCE = 1  # The loop is not monotone: one iteration without gain is no sign that it is over.
# Guarded sweeps cannot overfit the marginalised Gram as LDLQ does, so they get nearly the exact one.
REFINEMENT_DAMPING = 0.03


@dataclass(frozen=True, eq=False)
class Problem:
    """What every step is given.

    Attributes:
        W: [out, in] float32.
        gram: second moment of the layer's inputs.
        quantizer: makes Q.
        solver: makes L R.
        generator: draws the random starts of large SVDs.
        output: second moment H_O of the gradients at the layer's outputs. With it the loss is tr(H_O E H_I E^T), the
            second-order expansion of the model's loss in the error E (YAQA, 2025), else H_O = I.
        fit: what L R are fitted under instead of the Gram; see `metric`.
        fit_output: the same for the Gram of the outputs.
    """

    W: Tensor
    gram: DampedGram
    quantizer: Quantizer
    solver: LowRankSolver
    generator: torch.Generator
    output: DampedGram | None = None
    fit: DampedGram | None = None
    fit_output: DampedGram | None = None

    @property
    def fitted_under(self) -> tuple[DampedGram, DampedGram | None]:
        """The Grams of L R, at the inputs and at the outputs."""
        return self.fit or self.gram, self.fit_output or self.output

    def loss(self, W_hat: Tensor) -> float:
        """Relative proxy loss of an approximation [out, in]."""
        return relative_loss(self._weighted_square(self.W - W_hat), self._energy)

    @cached_property
    def _energy(self) -> float:
        return self._weighted_square(self.W)

    def _weighted_square(self, E: Tensor) -> float:
        return weighted_square(E, self.gram.H, None if self.output is None else self.output.H)


@dataclass(frozen=True, eq=False)
class Iterate:
    """Where a decomposition stands.

    Attributes:
        quantized: Q.
        low_rank: L R as stored.
        start: factors in float32 that the first step sees instead of the stored ones.
    """

    quantized: QuantizedMatrix
    low_rank: LowRank
    start: Pair | None = None

    @property
    def pair(self) -> Pair:
        """L [out, r] and R [r, in] float32, as the next step sees them."""
        return self.start or (self.low_rank.L.dense(), self.low_rank.R.dense())

    def dense(self) -> Tensor:
        """Q + L R as stored, [out, in] float32."""
        return self.quantized.dequantize() + self.low_rank.dense()


class Step(ABC):
    """Improves Q or L R with the other fixed."""

    @abstractmethod
    def apply(self, problem: Problem, at: Iterate) -> Iterate:
        """The next iterate."""


@dataclass(frozen=True)
class Round(Step):
    """Q from scratch: W - L R, rounded.

    Attributes:
        marginal_damping: ridge on the marginalised Gram, as a fraction of its mean diagonal. None rounds under the Gram
            itself: L R stay as they are, and Q takes over what they leave.
    """

    marginal_damping: float | None = None

    def apply(self, problem: Problem, at: Iterate) -> Iterate:
        """See the class."""
        residual, H = _seen(problem, at, self.marginal_damping)
        return Iterate(quantize_rows(problem.quantizer, residual, H, problem.output), at.low_rank)


@dataclass(frozen=True)
class Sweep(Step):
    """Q from the codes at hand, which change only where the loss falls.

    Attributes:
        marginal_damping: see `Round`.
    """

    marginal_damping: float | None = None

    def apply(self, problem: Problem, at: Iterate) -> Iterate:
        """See the class."""
        residual, H = _seen(problem, at, self.marginal_damping)
        return Iterate(refine_rows(problem.quantizer, residual, H, problem.output, at.quantized), at.low_rank)


@dataclass(frozen=True)
class Refit(Step):
    """L R to W - Q under the Grams themselves, or under what takes the place of that of the inputs."""

    def apply(self, problem: Problem, at: Iterate) -> Iterate:
        """See the class."""
        residual = problem.W - at.quantized.dequantize()
        fit, output = problem.fitted_under
        return Iterate(at.quantized, problem.solver.solve(residual, fit, problem.generator, output))


@dataclass(frozen=True)
class Complete(Step):
    """The ranks that are still free, to W - Q - L R; those at hand stay as they are (SRR, 2026)."""

    def apply(self, problem: Problem, at: Iterate) -> Iterate:
        """See the class."""
        L, R = at.pair
        free = min(problem.solver.rank, *problem.W.shape) - L.shape[1]
        residual = problem.W - at.quantized.dequantize() - L @ R
        fit, output = problem.fitted_under
        more = whitened_factors(residual, fit, free, problem.generator, output)
        return Iterate(at.quantized, problem.solver.store(torch.cat([L, more[0]], 1), torch.cat([R, more[1]])))


def _seen(problem: Problem, at: Iterate, marginal_damping: float | None) -> tuple[Tensor, Tensor]:
    """W - L R [out, in], and the Gram [in, in] of a step that changes Q."""
    L, R = at.pair
    H = problem.gram.H if marginal_damping is None else marginalise(problem.gram, R, marginal_damping)
    return problem.W - L @ R, H


@dataclass(frozen=True)
class Stage:
    """Steps that are repeated; their result is rated after each repetition.

    Attributes:
        steps: in their order, at least one.
        times: repetitions, at least 1.
        patience: repetitions in a row without a gain worth having before the stage ends; None never ends it early.
        from_best: whether each repetition starts from the best iterate of all so far, or from the last.

    Raises:
        SpecError: if there is no step or no repetition, or patience is negative.
    """

    steps: tuple[Step, ...]
    times: int = 1
    patience: int | None = None
    from_best: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise SpecError("a stage has no steps. Give it some of Round(), Sweep() and Refit().")
        if self.times < 1:
            raise SpecError(f"times must be at least 1, got {self.times}. Leave the stage out.")
        if self.patience is not None and self.patience < 0:
            raise SpecError(f"patience must be at least 0, or None, got {self.patience}.")


Schedule = tuple[Stage, ...]


def alternating(iters: int, refinements: int, marginal_damping: float, closing: bool = True) -> Schedule:
    """Saha et al., CALDERA, 2024, algorithm 1, with changes.

    Roundings see the marginalised Gram. From scratch they can raise the loss; so the best iterate is kept, and improved
    by guarded sweeps, each followed by a refit. The last step is a guarded sweep under the Gram itself, with L R fixed,
    which also takes over the rounding of the factors.

    Args:
        iters: roundings from scratch, each with a refit, at least 1.
        refinements: sweeps, each with a refit, at least 0.
        marginal_damping: what the roundings see; see `Round`.
        closing: whether the last step is run.
    """
    stages = [Stage((Round(marginal_damping), Refit()), iters, PATIENCE)]
    if refinements:
        stages.append(Stage((Sweep(REFINEMENT_DAMPING), Refit()), refinements, patience=0, from_best=True))
    if closing:
        stages.append(Stage((Sweep(),), from_best=True))
    return tuple(stages)


# Sweeps that belong to a rounding, and the bits of the factors, are choices of the quantizer and of the solver.
SCHEDULES: dict[str, Schedule] = {
    # W - L R rounded: GPTQ (Frantar et al., 2023), where there are no factors and `LDLQ` runs no sweeps.
    "q-only": (Stage((Round(),)),),
    # No codes: L R of W itself, Q = 0 (LoRD, 2023).
    "lr-only": (Stage((Refit(),)),),
    # W rounded, then a refit to what that broke: from zero factors once (EoRA, 2024), or many times (CALDERA, 2024,
    # algorithm 1; LoftQ, 2023).
    "q-first": (Stage((Round(), Refit())),),
    # L R of W itself, then Q takes over what they leave, their rounding too (SVDQuant, 2024; QPiSSA, 2024).
    "lr-first": (Stage((Refit(), Round())),),
    # The same, with each half rated: Q rounded for the loss that a refit will leave (the released code of CALDERA,
    # 2024, whose `sigma_reg2` is the damping).
    "lr-first-marginal": (Stage((Refit(),)), Stage((Round(0.01),))),
    # W - L R rounded, then the ranks that are left fitted to what that broke (SRR, 2026).
    "complete": (Stage((Round(), Complete())),),
}
ALTERNATING = "alternating"  # By name, what `alternating` makes of the options of a matrix.


def register_schedule(name: str, schedule: Schedule) -> None:
    """Make a schedule known by name.

    Raises:
        SpecError: if another one has that name.
    """
    if SCHEDULES.setdefault(name, schedule) != schedule:
        raise SpecError(f"a schedule {name!r} is registered already. Choose another name.")


def get_schedule(name: str, iters: int = 1) -> Schedule:
    """The schedule of a name, repeated.

    Args:
        name: one of `SCHEDULES`.
        iters: how often all of its stages are run, at least 1.

    Raises:
        SpecError: if there is none of that name.
    """
    if name == ALTERNATING:
        raise SpecError('"alternating" depends on the options of a matrix: alternating(iters, refinements, ...) is it.')
    check_schedule(name)
    return SCHEDULES[name] * iters


def check_schedule(name: str) -> None:
    """Refuse the name of a schedule that there is not.

    Raises:
        SpecError: with those that there are.
    """
    known = (ALTERNATING, *SCHEDULES)
    if name not in known:
        raise SpecError(f"Unknown schedule {name!r}. Known schedules: {', '.join(known)}.{did_you_mean(name, known)}")
