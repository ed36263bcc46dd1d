"""All matrices of a model, in place, one block at a time."""

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.calibration.blocks import find_stacks
from hf_lrq.calibration.calibrate import Calibration
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.gradients import Sensitivity
from hf_lrq.calibration.progress import Progress, SilentProgress
from hf_lrq.decomposition import InputGram, OutputGram
from hf_lrq.errors import CalibrationError, CompressionError, LRQError
from hf_lrq.work import (
    CompressionReport,
    Deferred,
    LayerRecord,
    ModelSink,
    ModelSource,
    Plan,
    Sink,
    Site,
    Threads,
    compress_sites,
)
from hf_lrq.work.plan import nothing_left

DATA_FREE = {"method": "data-free", "sequences": 0, "tokens": 0}  # What a report says about calibration.


def compress_model(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch] | None,
    *,
    sequential: bool = True,
    two_sided: bool = False,
    sensitivity: Sensitivity | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """Carry out a plan on a model in memory.

    The result depends on the model, the batches and the plan alone, not on the number of threads: on a CPU,
    torch.get_num_threads() threads work side by side, each on whole matrices and whole batches.

    Args:
        model: changed in place. Its mode, its configs and the global random state are left as they were.
        plan: made for this model, see `work.make_plan`.
        batches: calibration inputs, see `batches.Batch`; None compresses without data.
        sequential: calibrate each block on the outputs of the compressed blocks before it, else on those of the
            original ones.
        two_sided: weigh errors at the outputs, too, by gradients of what the original model predicts.
        sensitivity: these gradients, where they are known already, see `budgeting`.
        progress: told about each step.

    Returns:
        What happened to each matrix. Modules that saw no usable input are compressed without data and named in
        `warnings`; those whose weights are too large or too small are left alone and named in `skipped`.

    Raises:
        CompressionError: if a weight is not finite, nothing is left to compress, or the model is itself a layer.
        CalibrationError: if `batches` is empty, or activations or gradients are not finite; if `two_sided` is asked for
            without data. After an error the model may be partly compressed; the message says so.
    """
    started = time.monotonic()
    check_data(batches, two_sided)
    if any(site.holder == "" for site in plan.specs):
        raise CompressionError(
            f"the model is a single {type(model).__name__}, which cannot be replaced inside itself. Put it into an "
            "nn.Sequential, or use compress_matrix."
        )
    progress = progress or SilentProgress()
    with Threads.for_model(model) as workers, as_for_inference(model) as modes:
        plan = checked(plan, model, workers)
        sink = ModelSink(model, modes)
        later = Deferred(sink)
        work = _ModelWork(model, plan, later if batches is not None and not sequential else sink, workers, progress)
        inventory = plan.inventory
        progress.start(len(plan.matrices), inventory.compressed_parameters, next(model.parameters()).device)
        try:
            if batches is None or not work.sites:
                work.without_data()
            else:
                runner = ModelRunner(model, list(batches))
                progress.calibrate(runner.sequences, two_sided and sensitivity is None)
                correct = any(spec.correction for spec in plan.specs.values())
                Calibration(work, runner, sequential, two_sided, sensitivity, correct).run()
            work.tables()
            later.release()
        except LRQError as error:
            if not sink.installed:
                raise
            raise type(error)(
                f"{error} The model is partly compressed: {sink.installed} of {len(plan.specs)} targets are "
                "replaced. Load it again before another attempt."
            ) from error
        else:
            work.report.seconds = time.monotonic() - started
            order = {name: index for index, name in enumerate(plan.matrices)}
            work.report.layers.sort(key=lambda record: order[record.name])
            progress.finish(work.report)
        finally:
            progress.close()
    return work.report


def check_data(batches: Iterable[Batch] | None, two_sided: bool, asked: str | None = None) -> None:
    """Refuse a request for more than there is data for.

    Args:
        batches: calibration inputs, if any.
        two_sided: whether gradients are asked for.
        asked: option that a budget was given by.

    Raises:
        CalibrationError: if gradients, or a budget, are asked for without data.
    """
    asked = "two_sided" if two_sided else asked
    if asked is not None and batches is None:
        raise CalibrationError(
            f"{asked} takes gradients over calibration data, and there is none. Give batches or a dataset, or leave it "
            "out."
        )


class _ModelWork:
    """A plan for a model in memory, carried out some sites at a time."""

    def __init__(self, model: nn.Module, plan: Plan, sink: Sink, workers: Threads, progress: Progress):
        self.model, self.workers = model, workers
        self.sites = [site for site in plan.specs if not site.of_tables]
        self.report = plan.inventory.report()
        self._plan, self._sink, self._progress = plan, sink, progress
        self._source = ModelSource(model)

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return self._plan.seed

    def compress(
        self,
        title: str,
        sites: Sequence[Site],
        grams: Mapping[str, InputGram],
        outputs: Mapping[str, OutputGram] | None = None,
    ) -> None:
        """Compress some sites side by side; those without a Gram without data.

        Args:
            title: what people call these sites.
            sites: any number of the plan's.
            grams: name of the matrix -> Gram of its inputs.
            outputs: name of the matrix -> Gram of the gradients at its outputs.
        """
        if not sites:
            return
        self._progress.group(title, sum(site.count for site in sites))

        def done(record: LayerRecord) -> None:
            self.report.layers.append(record)
            self._progress.layer(record)

        compress_sites(self._plan, sites, self._source, self._sink, self.workers, grams, done, outputs)

    def without_data(self) -> None:
        """Compress all sites without data, a stack's block at a time."""
        homes: dict[str, list[Site]] = {}
        stacks = find_stacks(self.model, self.sites)
        for site in self.sites:
            block = next((found for stack in stacks if (found := stack.block_of(site.name)) is not None), "")
            homes.setdefault(block, []).append(site)
        for block, sites in homes.items():
            self.compress(block or "outside the blocks", sites, {})
        self.report.calibration = dict(DATA_FREE)

    def tables(self) -> None:
        """Compress embeddings and output heads, without data; last, as what is calibrated sees the original ones."""
        if sites := [site for site in self._plan.specs if site.of_tables]:
            self.compress("embeddings", sites, {})


def checked(plan: Plan, model: nn.Module, workers: Threads) -> Plan:
    """What can be done of a plan: looks at all weights before hours are spent on some of them.

    Raises:
        CompressionError: naming a matrix that is not finite or not in memory; if nothing is left.
    """
    source = ModelSource(model)

    def problem_of(site: Site) -> str | None:
        weight = source.parameter(site)
        if weight.device.type == "meta":
            raise CompressionError(
                f"{site.label}: the weight is not in memory (meta device). Load the model without offloading."
            )
        if not torch.isfinite(weight).all():
            bad = int((~torch.isfinite(weight)).sum())
            raise CompressionError(
                f"{site.label}: the weight holds {bad} values that are NaN or Inf. Repair or re-download the "
                "model, or leave this module out with modules_to_not_convert."
            )
        return site.scale_problem(weight)

    found = zip(plan.specs, workers.map(problem_of, plan.specs), strict=True)
    plan = plan.without({site.label: problem for site, problem in found if problem is not None})
    if not plan.specs:
        raise CompressionError(nothing_left(type(model).__name__, plan.left_alone))
    return plan
