"""A plan and a config carried out on a model in memory, with the budget that the config asks for."""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from hf_lrq.calibration import Batch, Budgeted, Progress, check_data, compress_model, fit_budget
from hf_lrq.checks import bytes_of
from hf_lrq.errors import SpecError
from hf_lrq.evaluation import size
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.work import Budget, CompressionReport, Plan, with_ranks


def carry_out(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch] | None,
    config: LRQConfig,
    progress: Progress | None = None,
) -> tuple[Plan, CompressionReport]:
    """Compress a model; the plan as it was carried out, and what happened to each matrix.

    Args:
        model: changed in place.
        plan: made for it.
        batches: calibration inputs; None compresses without data.
        config: how to calibrate, and the budget, which changes the plan.
        progress: told about each step.

    Raises:
        SpecError: if a budget is out of the range of what can be had.
        CompressionError, CalibrationError: see `compress_model`.
    """
    batches = None if batches is None else list(batches)
    check_data(batches, bool(config.two_sided), config.budget_option)
    plan, found = with_ranks(plan, model), None
    if config.budget_option is not None and batches is not None:
        found = _within_budget(model, plan, batches, config, progress)
        plan = found.plan
    report = compress_model(
        model,
        plan,
        batches,
        sequential=config.sequential,
        two_sided=config.weighs_outputs,
        sensitivity=found.sensitivity if found is not None and config.weighs_outputs else None,
        progress=progress,
    )
    if found is not None:
        report.budget = found.spent.to_dict()
        report.warnings[:0] = [warning for warning in found.warnings if warning not in report.warnings]
    return plan.without(report.skipped), report


def _within_budget(
    model: nn.Module, plan: Plan, batches: Iterable[Batch], config: LRQConfig, progress: Progress | None
) -> Budgeted:
    """The plan that fits; whole files fit to the byte, as the length of a header is known once all is chosen."""
    budget = budget_of(model, plan, config)
    found = fit_budget(model, plan, batches, budget, two_sided=config.weighs_outputs, progress=progress)
    if config.target_size is None:
        return found
    whole = bytes_of(config.target_size)
    while (file := size(model, found.plan.inventory.layouts).predicted_bytes) > whole:
        found = found.again(plan, replace(budget, bytes=found.spent.bytes - (file - whole)))
    return found


def budget_of(model: nn.Module, plan: Plan, config: LRQConfig) -> Budget:
    """What the matrices of a plan may take, and where the budget is for them as well the tables.

    Raises:
        SpecError: if the rest of the model takes more than the whole file may.
    """
    option = config.budget_option
    assert option is not None, "asked for where there is a budget"
    budget = Budget(0, config.spec, {option: getattr(config, option)}, tables=config.embedding_bits == "auto")
    sites = budget.sites(plan)
    if config.avg_bits is not None:
        return replace(budget, bytes=int(config.avg_bits * sum(site.weights for site in sites) / 8))
    whole = bytes_of(config.target_size)
    # With factors everywhere, as their names make the header longest.
    layouts = dict(plan.inventory.layouts)
    layouts |= {site: replace(layouts[site], rank=max(layouts[site].rank, 1)) for site in sites if not site.of_tables}
    rest = size(model, layouts).predicted_bytes - sum(site.bytes(layouts[site]) for site in sites)
    if rest >= whole:
        raise SpecError(
            f"target_size={config.target_size!r} is {whole:,} bytes, and all but the matrices that it is for takes "
            f"{rest:,}: {plan.inventory.summary()}. Choose a larger size, compress more modules, or give "
            "embedding_bits='auto'."
        )
    return replace(budget, bytes=whole - rest)
