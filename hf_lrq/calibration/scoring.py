"""What each matrix of a model would lose to each of the ways to store it, before any is compressed.

One pass over the calibration data for gradients, one for the Grams of the inputs, both of the original model, and the
`NoiseModel` of each matrix. A loss is the second-order expansion of what the error of the matrix does to the model's
output, for each position of it: for logits KL(original || compressed) in nats (`gradients`), so losses of different
matrices are comparable and add up as long as they are small.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from hf_lrq.calibration.calibrate import Calibration
from hf_lrq.calibration.capture import ModelRunner
from hf_lrq.calibration.gradients import Sensitivity
from hf_lrq.decomposition import InputGram, OutputGram, generator_for, input_rotation
from hf_lrq.decomposition.noise_model import Feedback, NoiseModel
from hf_lrq.decomposition.rotated import rotate
from hf_lrq.numerics import fixed_numerics
from hf_lrq.work import CompressionReport, Executor, ModelSource, Site
from hf_lrq.work.budget import Menu


class _Score(NamedTuple):
    """Of one matrix.

    Attributes:
        relative: loss of each spec, over that of a matrix of zeros.
        stake: loss of a matrix of zeros; None where no gradient is known.
        tokens: that reached it.
    """

    relative: list[float]
    stake: float | None
    tokens: int


@dataclass(frozen=True)
class Scores:
    """What was found.

    Attributes:
        losses: of each menu, for each of its specs.
        sensitivity: what the outputs of the layers mean.
        warnings: what was not as it should be, in words.
    """

    losses: list[list[float]]
    sensitivity: Sensitivity
    warnings: list[str]


def score(
    model: nn.Module, menus: Sequence[Menu], runner: ModelRunner, workers: Executor, seed: int, feedback: bool
) -> Scores:
    """Losses of all specs of some menus.

    Matrices without gradients, such as routed experts, count as much as the median of the others, in proportion to the
    tokens that reach them; without any gradient at all, all count alike.

    Args:
        model: the original one; not changed.
        menus: of matrices, no tables.
        runner: of the model, over the calibration batches.
        workers: to spread the work over.
        seed: of the plan.
        feedback: whether the roundings will feed errors into other rows, as two-sided ones do.

    Raises:
        CalibrationError: if activations or gradients are not finite.
    """
    work = _Scoring(model, menus, workers, seed, feedback)
    calibration = Calibration(work, runner, sequential=False, two_sided=True)
    calibration.run()
    return Scores(work.losses(), calibration.sensitivity, work.report.warnings)


class _Scoring:
    """The work of scoring; see `calibrate.Work`."""

    def __init__(self, model: nn.Module, menus: Sequence[Menu], workers: Executor, seed: int, feedback: bool):
        self.model, self.workers, self.seed = model, workers, seed
        self._menus, self._feedback, self._source = menus, feedback, ModelSource(model)
        self._specs = {site: menu.specs for menu in menus for site in menu.sites}
        self.sites, self.report = list(self._specs), CompressionReport()
        self._scores: dict[str, _Score] = {}

    def compress(
        self,
        title: str,
        sites: Sequence[Site],
        grams: Mapping[str, InputGram],
        outputs: Mapping[str, OutputGram] | None = None,
    ) -> None:
        """Score some sites instead."""
        matrices = [(site, index, name) for site in sites for index, name in enumerate(site.matrices)]
        outputs = outputs or {}

        def run(matrix: tuple[Site, int, str]) -> _Score:
            site, index, name = matrix
            return self._score(site, index, name, grams.get(name), outputs.get(name))

        found = self.workers.map(run, matrices)
        self._scores |= {name: one for (*_, name), one in zip(matrices, found, strict=True)}

    def _score(self, site: Site, index: int, name: str, gram: InputGram | None, output: OutputGram | None) -> _Score:
        W = site.matrix(self._source.parameter(site), index).detach().float()
        specs = self._specs[site]
        layouts = [None if each is None else each.layout for each in specs]
        spec = next(each for each in specs if each is not None)
        gram = InputGram.identity(W.shape[1], W.device) if gram is None else gram
        with fixed_numerics(W.device):
            rotate_in = input_rotation(self.seed, name, W.shape[1], spec)
            rotated = rotate(W, gram, spec, generator_for(self.seed, name), rotate_in, output)
            feeds_back = spec.rounding == "ldlq"
            feedback = Feedback(feeds_back, feeds_back and self._feedback)
            model = NoiseModel(rotated, feedback, max(layout.rank for layout in layouts if layout is not None))
            losses = [0.0 if layout is None else model.loss(layout) for layout in layouts]
            relative = [loss / max(model.energy, 1e-30) for loss in losses]
        # Half of the curvature; the Grams of the model have a mean diagonal of 1, so their traces are their widths.
        stake = None if output is None else output.energy * model.energy / (2 * W.numel())
        return _Score(relative, stake, gram.n_tokens)

    def losses(self) -> list[list[float]]:
        """Of each menu, for each of its specs."""
        stakes = [one.stake for one in self._scores.values() if one.stake is not None]
        usual = statistics.median(stakes) if stakes else 1.0
        most = max((one.tokens for one in self._scores.values()), default=1) or 1
        return [self._losses(menu, usual, most) for menu in self._menus]

    def _losses(self, menu: Menu, usual: float, most: int) -> list[float]:
        sums = [0.0] * len(menu.specs)
        for name in (name for site in menu.sites for name in site.matrices):
            one = self._scores[name]
            stake = usual * one.tokens / most if one.stake is None else one.stake
            sums = [total + stake * loss for total, loss in zip(sums, one.relative, strict=True)]
        return sums
