"""All matrices of a model, in place, one block at a time."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_lrq.calibration.batches import Batch
from hf_lrq.calibration.blocks import find_stacks
from hf_lrq.calibration.calibrate import Calibration
from hf_lrq.calibration.capture import ModelRunner, as_for_inference
from hf_lrq.calibration.progress import Progress, SilentProgress
from hf_lrq.calibration.records import CompressionReport, LayerRecord
from hf_lrq.calibration.targets import Target, TargetList, find_targets
from hf_lrq.calibration.workers import Workers
from hf_lrq.decomposition import CompressedMatrix, InputGram, compress_matrix, generator_for, input_rotation
from hf_lrq.errors import CompressionError, LRQError
from hf_lrq.nn import LRQLinear
from hf_lrq.spec import CompressionSpec

InstallExperts = Callable[[nn.Module, Target, list[CompressedMatrix]], None]


def compress(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    spec: CompressionSpec,
    *,
    skip: Sequence[str] = (),
    reasons: dict[str, str] | None = None,
    sequential: bool = True,
    progress: Progress | None = None,
    install_experts: InstallExperts | None = None,
) -> CompressionReport:
    """Replace the linear layers of a model by compressed ones.

    For any torch module. A model of transformers that is to be saved and loaded again goes through
    `compress_pretrained`, which also records what it is.

    The result depends on the model, the batches and the spec alone, not on the number of threads: on a CPU,
    torch.get_num_threads() threads work side by side, each on whole matrices and whole batches.

    Args:
        model: changed in place. Its mode, its configs and the global random state are left as they were.
        batches: calibration inputs, see `batches.Batch`; None compresses without data.
        spec: what to do to each matrix.
        skip, reasons: modules to leave alone and why, see `targets.find_targets`.
        sequential: calibrate each block on the outputs of the compressed blocks before it, else on those of the
            original ones.
        progress: told about each step.
        install_experts: puts the compressed matrices of one stack of fused experts into its module. Without it such
            stacks are skipped.

    Returns:
        What happened to each matrix. Modules that saw no usable input are compressed without data and named in
        `warnings`.

    Raises:
        CompressionError: if there is nothing to compress, or a weight is not finite.
        CalibrationError: if `batches` is empty, or activations are not finite. After an error the model may be partly
            compressed; the message says so.
    """
    started = time.monotonic()
    targets = find_targets(model, spec, skip, reasons)
    if install_experts is None:
        _drop_experts(model, targets)
    if any(target.name == "" and target.kind != "experts" for target in targets.compressed):
        raise CompressionError(
            f"the model is a single {type(model).__name__}, which cannot be replaced inside itself. Put it into an "
            "nn.Sequential, or use compress_matrix."
        )
    progress = progress or SilentProgress()
    report = CompressionReport.for_targets(targets)
    with Workers.for_model(model) as workers, as_for_inference(model) as modes:
        work = _Compression(model, spec, workers, progress, report, targets, modes, install_experts)
        device = next(model.parameters()).device
        work.check_weights()
        progress.start(sum(target.experts for target in targets.compressed), targets.compressed_parameters, device)
        try:
            if batches is None:
                work.without_data()
            else:
                runner = ModelRunner(model, list(batches))
                Calibration(work, runner, sequential).run()
            work.install_deferred()
        except LRQError as error:
            if not work.installed:
                raise
            raise type(error)(
                f"{error} The model is partly compressed: {work.installed} of {len(targets.compressed)} targets are "
                "replaced. Load it again before another attempt."
            ) from error
        else:
            report.seconds = time.monotonic() - started
            work.sort_layers()
            progress.finish(report)
        finally:
            progress.close()
    return report


def _drop_experts(model: nn.Module, targets: TargetList) -> None:
    for target in [target for target in targets.compressed if target.kind == "experts"]:
        targets.compressed.remove(target)
        targets.skipped[target.full_name] = "fused experts need a caller that can install them"
        targets.skipped_parameters[target.full_name] = target.parameters
    if not targets.compressed:
        raise CompressionError(
            f"{type(model).__name__} has no layer to compress but fused experts, which need `install_experts`. "
            "Compress it through hf_lrq's transformers integration."
        )


class _Matrix(NamedTuple):
    """One matrix of a target."""

    name: str
    target: Target
    expert: int


class _Compression:
    """Compresses targets and puts the results into the model."""

    def __init__(
        self,
        model: nn.Module,
        spec: CompressionSpec,
        workers: Workers,
        progress: Progress,
        report: CompressionReport,
        targets: TargetList,
        modes: Mapping[nn.Module, bool],
        install_experts: InstallExperts | None,
    ):
        self.model, self.workers, self.report, self.targets = model, workers, report, targets.compressed
        self.installed = 0
        self._spec, self._progress, self._modes, self._install_experts = spec, progress, modes, install_experts
        self._deferred: list[tuple[Target, list[CompressedMatrix]]] = []
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for key, child in parent._modules.items():
                self._places.setdefault(id(child), []).append((parent, key))

    def compress(
        self, title: str, targets: Sequence[Target], grams: Mapping[str, InputGram], defer: bool = False
    ) -> None:
        """Compress some targets side by side.

        Args:
            title: of these targets, for people.
            targets: any number.
            grams: by the name of the matrix; those without one are compressed without data.
            defer: leave the model as it is until `install_deferred`.
        """
        if not targets:
            return
        matrices = [
            _Matrix(target.full_name if target.kind != "experts" else f"{target.full_name}.{expert}", target, expert)
            for target in targets
            for expert in range(target.experts)
        ]
        self._progress.group(title, len(matrices))
        results = self.workers.stream(lambda matrix: self._compress_one(matrix, grams.get(matrix.name)), matrices)
        done: dict[str, list[CompressedMatrix]] = {}
        for matrix, (compressed, record) in zip(matrices, results, strict=True):
            done.setdefault(matrix.target.full_name, []).append(compressed)
            self.report.layers.append(record)
            self._progress.layer(record)
        for target in targets:
            if defer:
                self._deferred.append((target, done[target.full_name]))
            else:
                self._install(target, done[target.full_name])

    def check_weights(self) -> None:
        """Look at all weights before hours are spent on some of them.

        Raises:
            CompressionError: naming the matrix that is not finite or not in memory.
        """

        def check(target: Target) -> None:
            weight = getattr(self.model.get_submodule(target.name), target.matrix)
            if weight.device.type == "meta":
                raise CompressionError(
                    f"{target.full_name}: the weight is not in memory (meta device). Load the model without offloading."
                )
            if not torch.isfinite(weight).all():
                bad = int((~torch.isfinite(weight)).sum())
                raise CompressionError(
                    f"{target.full_name}: the weight holds {bad} values that are NaN or Inf. Repair or re-download the "
                    "model, or leave this module out with modules_to_not_convert."
                )

        self.workers.map(check, self.targets)

    def without_data(self) -> None:
        """Compress all targets without data, a stack's block at a time."""
        homes: dict[str, list[Target]] = {}
        stacks = find_stacks(self.model, self.targets)
        for target in self.targets:
            block = next((found for stack in stacks if (found := stack.block_of(target.name)) is not None), "")
            homes.setdefault(block, []).append(target)
        for block, targets in homes.items():
            self.compress(block or "outside the blocks", targets, {})
        self.report.calibration = {"method": "data-free", "sequences": 0, "tokens": 0}

    def install_deferred(self) -> None:
        """Put in place what was left out so far."""
        for target, matrices in self._deferred:
            self._install(target, matrices)
        self._deferred = []

    def sort_layers(self) -> None:
        """Bring the records into the order of the model."""
        order = {target.full_name: index for index, target in enumerate(self.targets)}

        def place(record: LayerRecord) -> tuple[int, int]:
            if record.kind != "experts":
                return order[record.name], 0
            stack, _, expert = record.name.rpartition(".")
            return order[stack], int(expert)

        self.report.layers.sort(key=place)

    def _compress_one(self, matrix: _Matrix, gram: InputGram | None) -> tuple[CompressedMatrix, LayerRecord]:
        started = time.monotonic()
        target, seed = matrix.target, self._spec.seed
        W = _weight(self.model.get_submodule(target.name), target, matrix.expert)
        rotate_in = input_rotation(seed, matrix.name, target.in_features, target.spec)
        try:
            compressed = compress_matrix(W, gram, target.spec, generator_for(seed, matrix.name), rotate_in)
        except LRQError as error:
            raise type(error)(f"{matrix.name}: {error}") from error
        seconds = time.monotonic() - started
        return compressed, LayerRecord.of(matrix.name, target, compressed, seconds)

    def _install(self, target: Target, matrices: list[CompressedMatrix]) -> None:
        module = self.model.get_submodule(target.name)
        if target.kind == "experts":
            assert self._install_experts is not None, "expert stacks are skipped without it"
            self._install_experts(module, target, matrices)
        else:
            bias: Tensor | None = getattr(module, "bias", None)
            layer = LRQLinear.from_matrix(matrices[0], bias).train(self._modes[module])
            # A module may hang in the model in more than one place.
            for parent, key in self._places[id(module)]:
                parent._modules[key] = layer
        self.installed += 1


def _weight(module: nn.Module, target: Target, expert: int) -> Tensor:
    """One matrix as [out, in]."""
    stored: Tensor = getattr(module, target.matrix)
    if target.kind == "experts":
        return stored[expert]
    return stored.T if target.kind == "conv1d" else stored
