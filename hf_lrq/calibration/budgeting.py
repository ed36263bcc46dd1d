"""A plan made to fit into a budget, by what each matrix of a model is predicted to lose, and each table loses."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.compress import checked
from hf_lrq.calibration.gradients import Sensitivity
from hf_lrq.calibration.progress import Progress, SilentProgress
from hf_lrq.calibration.scoring import score
from hf_lrq.calibration.tables import table_losses
from hf_lrq.errors import CalibrationError
from hf_lrq.kernels import has_backend
from hf_lrq.work import ModelSource, Plan, Threads
from hf_lrq.work.budget import Budget, Spent
from hf_lrq.work.menus import Menu


@dataclass(frozen=True)
class Budgeted:
    """What came of a budget.

    Attributes:
        plan: with other bits and ranks.
        spent: what was predicted.
        sensitivity: what the outputs of the layers mean, for `compress_model`.
        warnings: what was not as it should be, in words.
        menus: what there was to choose from.
        losses: of each menu, for each of its specs.
    """

    plan: Plan
    spent: Spent
    sensitivity: Sensitivity
    warnings: Sequence[str]
    menus: Sequence[Menu]
    losses: Sequence[Sequence[float]]

    def again(self, plan: Plan, budget: Budget) -> "Budgeted":
        """What comes of another budget for the same plan.

        Raises:
            SpecError: if it is out of the range of what can be had.
        """
        changed, spent = budget.spend(plan, self.menus, self.losses)
        return replace(self, plan=changed, spent=spent)


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
        CalibrationError: if activations or gradients are not finite, or there is no batch; if tables are to be weighed
            against matrices that no gradient comes back to.
    """
    with Threads.for_model(model) as workers, as_for_inference(model):
        plan = checked(plan, model, workers)
        source = ModelSource(model)
        plain = {site: source.parameter(site).nbytes for site in plan.specs}
        menus = budget.menus(plan, has_backend(next(model.parameters()).device), plain)
        matrices, tables = ([menu for menu in menus if menu.of_tables == kind] for kind in (False, True))
        runner = ModelRunner(model, list(batches))
        (progress or SilentProgress()).calibrate(runner.sequences, gradients=True)
        found = score(model, matrices, runner, workers, plan.seed, two_sided)
        if tables and matrices and not found.sensitivity.grams:
            raise CalibrationError(
                f"no gradient comes back to any matrix of {type(model).__name__}, so nothing tells what they mean "
                f"beside {tables[0].label}. Give embedding_bits a number."
            )
        losses = found.losses + table_losses(model, tables, runner, workers, plan.seed)
    changed, spent = budget.spend(plan, menus, losses)
    return Budgeted(changed, spent, found.sensitivity, found.warnings, menus, losses)
