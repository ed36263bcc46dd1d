"""A plan made to fit into a budget, by what each matrix of a model is predicted to lose."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.compress import checked
from hf_lrq.calibration.gradients import Sensitivity
from hf_lrq.calibration.progress import Progress, SilentProgress
from hf_lrq.calibration.scoring import score
from hf_lrq.kernels import has_backend
from hf_lrq.work import Plan, Threads
from hf_lrq.work.budget import Budget, Spent


class Budgeted(NamedTuple):
    """What came of a budget.

    Attributes:
        plan: with other bits and ranks.
        spent: what was predicted.
        sensitivity: what the outputs of the layers mean, for `compress_model`.
        warnings: what was not as it should be, in words.
    """

    plan: Plan
    spent: Spent
    sensitivity: Sensitivity
    warnings: list[str]


def fit_budget(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    budget: Budget,
    *,
    two_sided: bool = False,
    progress: Progress | None = None,
) -> Budgeted:
    """Choose bits and rank of each matrix of a plan so that the model loses least within a budget.

    Args:
        model: the original one; not changed.
        plan: made for it.
        batches: calibration inputs.
        budget: what the matrices may take.
        two_sided: whether they will be compressed so.
        progress: told that the passes begin.

    Raises:
        SpecError: if the budget is out of the range of what can be had.
        CompressionError: if a weight is not finite, or nothing is left to compress.
        CalibrationError: if activations or gradients are not finite, or there is no batch.
    """
    with Threads.for_model(model) as workers, as_for_inference(model):
        plan = checked(plan, model, workers)
        menus = budget.menus(plan, blocks=has_backend(next(model.parameters()).device))
        runner = ModelRunner(model, list(batches))
        (progress or SilentProgress()).calibrate(runner.sequences, gradients=True)
        found = score(model, menus, runner, workers, plan.seed, two_sided)
    plan, spent = budget.spend(plan, menus, found.losses)
    return Budgeted(plan, spent, found.sensitivity, found.warnings)
