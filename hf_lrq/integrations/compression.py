"""The one verb for a model in memory, of transformers or any other."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from hf_lrq.calibration import Batch, Progress
from hf_lrq.checkpoint import QUANT_METHOD
from hf_lrq.errors import SpecError
from hf_lrq.integrations.calibration_data import calibration_batches
from hf_lrq.integrations.carrying_out import carry_out
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.integrations.decompression import decompress
from hf_lrq.integrations.planning import plan_for
from hf_lrq.integrations.transformers import LRQHfQuantizer, prepare_layers
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import CompressionReport, Plan


def compress(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    config: LRQConfig | CompressionSpec | LayerSpec | None = None,
    *,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """Replace the linear layers of a model by compressed ones.

    A model of transformers then saves and loads like one that was compressed while it was loaded. The result depends
    on the model, the batches and the config alone, not on the number of threads.

    Args:
        model: changed in place. Where an error stops the work, some of its layers may be compressed already; the
            message says so.
        batches: calibration inputs: token tensors [length] or [batch, length], or mappings of the model's arguments;
            None takes those that the config asks for, and compresses without data if it asks for none.
        config: what to do, as a config or a spec alone; None takes the defaults.
        plan: what to do to each matrix, where it has been made already.
        progress: told about each step.

    Returns:
        What happened to each matrix. Modules that saw no usable input are compressed without data and named in
        `warnings`.

    Raises:
        SpecError: if the model is quantized already.
        CompressionError: if a weight holds NaN or Inf, or if there is nothing to compress.
        CalibrationError: if the calibration data cannot support the request.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise SpecError(f"this {type(model).__name__} is quantized already. Load the original model.")
    if not isinstance(config, LRQConfig):
        config = LRQConfig() if config is None else LRQConfig.from_spec(config)
    config = config.for_compression()
    config.check_data(batches is not None or config.calibrated)
    plan = plan or plan_for(model, config)
    if batches is None and config.calibrated:
        batches = calibration_batches(model, config)
    if isinstance(model, PreTrainedModel):
        return _compress_for_transformers(model, plan, batches, config, progress)
    dtype = next(model.parameters()).dtype
    plan, report = carry_out(model, plan, batches, config, progress)
    prepare_layers(model, config)
    if config.dequantize:
        decompress(model, plan.specs, dtype)
    return report


def _compress_for_transformers(
    model: PreTrainedModel,
    plan: Plan,
    batches: Iterable[Batch] | None,
    config: LRQConfig,
    progress: Progress | None,
) -> CompressionReport:
    quantizer = LRQHfQuantizer(config, pre_quantized=False)
    quantizer.provenance.base_model = model.config._name_or_path or None
    quantizer.compress_in_place(model, plan, batches, progress)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    quantizer.postprocess_model(model)
    assert quantizer.report is not None, "made by compress_in_place"
    return quantizer.report
