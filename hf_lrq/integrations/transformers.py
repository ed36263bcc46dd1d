"""The quantizer that transformers runs: compress while loading, load compressed checkpoints, save them again."""

import copy
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import is_progress_bar_enabled

from hf_lrq.calibration.batches import Batch
from hf_lrq.calibration.compress import compress
from hf_lrq.calibration.progress import Progress, TqdmProgress
from hf_lrq.calibration.records import CompressionReport, LayerRecord
from hf_lrq.calibration.targets import EXPERT_MATRICES, Target, TargetList, all_names, find_targets
from hf_lrq.checkpoint import QUANT_METHOD, QuantizationHeader, check_headers, read_headers
from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import CheckpointError, CompressionError, SpecError
from hf_lrq.integrations.calibration_data import calibration_batches, described
from hf_lrq.integrations.config import LRQConfig, stored_header
from hf_lrq.integrations.conversions import names_in_files, names_in_model, spare_on_save, sparing
from hf_lrq.integrations.experts import owns_stacks, remove_stacks, use_stacks
from hf_lrq.integrations.layers import (
    as_conv1d,
    biases_of,
    check_here,
    compress_weight,
    fill,
    install,
    install_stack,
    module_of,
    plain_linear,
    stored_modules,
    stored_targets,
    tensors_of,
    with_hook_of,
)
from hf_lrq.integrations.saving import bind_saving, unbind_saving
from hf_lrq.integrations.skip_rules import is_candidate, skip_reasons
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQExpertStack, LRQLinear, fuse_layers, unfuse_layers
from hf_lrq.patterns import exactly

__all__ = ["LRQConfig", "LRQHfQuantizer", "compress_pretrained"]

logger = logging.getLogger(__name__)

_Class = TypeVar("_Class", bound=type)


def _registered(register: Callable[[str], Callable[[_Class], _Class]], known: dict[str, Any]) -> Any:
    """`register(QUANT_METHOD)`, which also works when this module is imported again."""
    known.pop(QUANT_METHOD, None)
    return register(QUANT_METHOD)


_registered(auto.register_quantization_config, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)(LRQConfig)

# The function of transformers, also when this module is imported again.
_merge = auto.AutoHfQuantizer.merge_quantization_configs
_merge = getattr(_merge, "__wrapped__", _merge)


@functools.wraps(_merge)
def _merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
    """Config of a compressed checkpoint, and what the user passed beside it, which transformers would drop."""
    if isinstance(quantization_config, dict) and quantization_config.get("quant_method") == QUANT_METHOD:
        quantization_config = LRQConfig.from_dict(quantization_config)
    if isinstance(quantization_config, LRQConfig):
        wish = quantization_config_from_args
        if isinstance(wish, dict) and wish.get("quant_method") == QUANT_METHOD:
            wish = LRQConfig.from_dict(wish)
        if wish is None or isinstance(wish, LRQConfig):
            return quantization_config.with_wish(wish)
    return _merge(quantization_config, quantization_config_from_args)


auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_quantization_configs)


class CompressOnLoad(ConversionOps):
    """Turns a weight that is being loaded into the tensors of its compressed layer."""

    def __init__(self, quantizer: "LRQHfQuantizer"):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_: Any, **context: Any) -> dict[str, Any]:
        """{full key: weight} -> {full key: tensor} of everything stored instead."""
        converted: dict[str, Any] = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            converted |= self.quantizer.compress_loaded(key, weight, context["model"], context.get("missing_keys"))
        return converted


@_registered(auto.register_quantizer, auto.AUTO_QUANTIZER_MAPPING)
class LRQHfQuantizer(HfQuantizer):
    """Works on a model in one of three ways.

    A compressed checkpoint: before loading, linear layers become empty compressed ones, once the headers of the files
    agree with config and model. An uncompressed one without calibration data: weights are compressed one by one as they
    are loaded. With calibration data: the model is loaded as it is and compressed afterwards.

    Attributes:
        report: what happened to each matrix, once the model has been compressed here; None for a checkpoint.
        targets: what is compressed and what is not.
        source: folder of the compressed checkpoint that was loaded.
        base_model: name or path of the model that was compressed here.
        recipe: the options it was compressed with.
        evaluation: of the compressed model, for its report.
    """

    requires_calibration = False
    quantization_config: LRQConfig
    pre_quantized: bool

    def __init__(self, quantization_config: LRQConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        # A copy: the user may compress another model with the same object.
        if self.pre_quantized:
            stored_header(quantization_config)
            self.quantization_config = copy.copy(quantization_config)
        else:
            self.quantization_config = quantization_config.for_compression()
        self.report: CompressionReport | None = None
        self.targets: TargetList | None = None
        self.source: Path | None = None
        self.base_model: str | None = None
        self.recipe: dict[str, Any] = {}
        self.evaluation: Any = None
        self._batches: list[Batch] = []
        self._pending: dict[str, Target] = {}  # Parameter still to be loaded -> what becomes of it.
        self._records: dict[str, list[LayerRecord]] = {}
        self._missing: set[str] | None = None
        self._failure: Exception | None = None
        self._dtype: torch.dtype | None = None
        self._started = time.monotonic()

    # What transformers asks.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse placements that cannot work.

        Raises:
            SpecError: on offloading of a model that is to be compressed or decompressed here.
        """
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        config = self.quantization_config
        if "disk" in devices and not self.pre_quantized:
            raise SpecError(
                "A model cannot be compressed while parts of it are offloaded to disk: device_map sends "
                f"{_some(name for name, device in device_map.items() if device == 'disk')} there. "
                "Compress with device_map='cpu', save, and load the result with offloading."
            )
        offloaded = "disk" in devices or ("cpu" in devices and len(devices) > 1)
        if offloaded and (config.dequantize or (config.calibrated and not self.pre_quantized)):
            doing = "decompressed" if config.dequantize else "calibrated"
            raise SpecError(f"A model cannot be {doing} while parts of it are offloaded. Use device_map='cpu'.")

    def update_device_map(self, device_map: Any) -> Any:
        """Compress on the current GPU if there is one and the user did not say otherwise."""
        if device_map is None and not self.pre_quantized and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remember the dtype of the uncompressed tensors."""
        self._dtype = dtype
        return dtype

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this parameter is compressed as it is loaded."""
        return not self.pre_quantized and param_name in self._pending

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element; for weights that will be compressed, of their codes."""
        target = self._pending.get(param_name)
        if target is None:
            return float(super().param_element_size(model, param_name, param))
        if target.kind == "experts":
            return 0.0  # The stack that takes its place is a module of its own, counted as such.
        return target.spec.layout.tensors(target.out_features, target.in_features)["weight"].bytes / param.numel()

    def get_quantize_ops(self) -> CompressOnLoad:
        """The operation on weights that need quantization."""
        return CompressOnLoad(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Leave compressed tensors as they are in the file."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *args)
        return sparing(conversions, self._compressed_keys()) if self.pre_quantized else conversions

    def is_serializable(self, **kwargs: Any) -> bool:
        """Yes: everything is in the state dict."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The factors themselves can be trained, too."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are custom operators with shape rules."""
        return True

    def backends(self, model: Any, dtype: torch.dtype | None = None) -> dict[str, str]:
        """Module name -> what computes it for inputs of `dtype` (default: that of the model), and why not a faster one.

        Raises:
            BackendError: if a backend was asked for that cannot run.
        """
        return {
            name: module.runs_on(dtype or model.dtype)
            for name, module in model.named_modules()
            if isinstance(module, LRQLinear | LRQExpertStack)
        }

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Called by `save_pretrained` before it writes config.json: bring the config up to date with the modules.

        Tensors that a cast of the whole model has changed are stored in the dtype of the format.
        """
        self._describe(model)
        changed = {}
        for name, module in model.named_modules():
            if not isinstance(module, LRQLinear | LRQExpertStack):
                continue
            for key, layout in module.layout.tensors(module.out_features, module.in_features).items():
                tensor = getattr(module, key)
                if tensor.dtype != layout.dtype and tensor.device.type != "meta":
                    changed[f"{name}.{key}"] = tensor.to(layout.dtype)
        return ({**model.state_dict(), **changed} if changed else None), {}

    def remove_quantization_config(self, model: Any) -> None:
        """Make it an ordinary model again."""
        super().remove_quantization_config(model)
        unbind_saving(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = dtype or self._dtype or model.dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        known = self.targets.compressed if self.targets is not None else []
        transposed = {target.name for target in known if target.kind == "conv1d"}
        unfuse_layers(model)
        # All of them before the first is replaced: a model of both kinds must not come about.
        for name, module in model.named_modules():
            if isinstance(module, LRQLinear | LRQExpertStack):
                check_here(name, module.weight)
        for name, module in list(model.named_modules()):
            if owns_stacks(module):
                remove_stacks(module, dtype)
            elif isinstance(module, LRQLinear):
                plain = module.to_linear(dtype).requires_grad_(True).train(module.training)
                model.set_submodule(name, with_hook_of(module, as_conv1d(plain) if name in transposed else plain))
        return model

    # Before the weights are loaded.

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _refuse_tensor_parallelism(model)
        if self.pre_quantized:
            self._make_skeleton(model, kwargs.get("checkpoint_files") or [])
        else:
            self.base_model = model.config._name_or_path or None
            self._choose(model)
            if self.quantization_config.calibrated:
                # Before hours of loading, as data and tokenizer can be missing; here new tensors would be on meta.
                with torch.device("cpu"):
                    self._batches = calibration_batches(model, self.quantization_config)
            else:
                self._make_placeholders(model)
        return model

    def _choose(self, model: Any) -> dict[str, str]:
        """Decide what is compressed; returns pattern -> reason for the rest."""
        config = self.quantization_config
        patterns = tuple(config.modules_to_not_convert or ())
        if self.targets is None:  # With calibration data, this is run before and after loading.
            config.check_patterns(all_names(model))
        reasons = {exactly(name): why for name, why in skip_reasons(model, patterns).items()}
        targets = find_targets(model, config.spec, list(reasons), reasons)
        # A fused experts module computes with both of its stacks compressed or with none.
        owners = [target.name for target in targets.compressed if target.kind == "experts"]
        single = [name for name in owners if owners.count(name) < len(EXPERT_MATRICES)]
        if single:
            reasons |= {exactly(name): "only one of its two stacks would gain" for name in single}
            targets = find_targets(model, config.spec, list(reasons), reasons)
        self.targets = targets
        return reasons

    def _make_placeholders(self, model: Any) -> None:
        """Compressed layers with the uncompressed parameter still in place, for transformers to load into."""
        assert self.targets is not None, "targets are chosen first"
        install(model, self.targets.compressed, keep_weights=True)
        self._pending = {f"{target.name}.{target.matrix}": target for target in self.targets.compressed}

    def _make_skeleton(self, model: Any, files: list[str]) -> None:
        """Empty compressed layers, as the checkpoint has them.

        Raises:
            CheckpointError: if the files do not hold what config and model call for.
        """
        header = self._header_in_model_names(model)
        alone = set(header.modules_to_not_convert)
        targets = TargetList(total_parameters=sum(parameter.numel() for parameter in model.parameters()))
        for name, module in model.named_modules():
            if not is_candidate(module):
                continue
            if name in alone:
                targets.skipped[name] = "left alone when the checkpoint was made"
            else:
                targets.compressed += stored_targets(name, module, header)
        if files:
            self.source = Path(files[0]).parent
            self._check_files(model, files, targets)
        install(model, targets.compressed, keep_weights=False)
        self.targets = targets

    def _header_in_model_names(self, model: Any) -> QuantizationHeader:
        """The stored header with the modules named as they are in this class and release."""
        header = stored_header(self.quantization_config)
        wanted = [f"{each}.weight" for name, module in model.named_modules() for each in stored_modules(name, module)]
        keys = [f"{name}.weight" for name in (*header.modules_to_not_convert, *header.overrides)]
        name_of = {
            key.removesuffix(".weight"): name.removesuffix(".weight")
            for key, name in names_in_model(keys, model, wanted).items()
        }
        return QuantizationHeader(
            header.default,
            {name_of[name]: layout for name, layout in header.overrides.items()},
            tuple(name_of[name] for name in header.modules_to_not_convert),
        )

    def _check_files(self, model: Any, files: list[str], targets: TargetList) -> None:
        foreign = [file for file in files if not str(file).endswith(".safetensors")]
        if foreign:
            raise CheckpointError(f"{foreign[0]} is not a safetensors file; compressed checkpoints have no other.")
        tensors = {target: tensors_of(target) for target in targets.compressed}
        keys = {*model.state_dict(), *(key for each in tensors.values() for key in each)}
        headers = read_headers(files)
        found = {name: headers[key] for key, name in names_in_model(headers, model, keys).items()}
        # A head that this class adds to the model that was saved: transformers initialises it and says so.
        if type(model).__name__ not in (model.config.architectures or ()):
            for target in [target for target, each in tensors.items() if found.keys().isdisjoint(each)]:
                targets.compressed.remove(target)
                targets.skipped[target.name] = "not in the checkpoint"
                del tensors[target]
        expected = {key: layout for each in tensors.values() for key, layout in each.items()}
        expected |= biases_of(model, targets, found)
        check_headers(expected, found)

    # While they are loaded.

    def compress_loaded(self, key: str, weight: Tensor, model: Any, missing: set[str] | None) -> dict[str, Tensor]:
        """The tensors that replace the parameter `key`, by full key; any other parameter stays as it is."""
        target = self._pending.get(key)
        if target is None:
            return {key: weight}
        self._missing = missing
        tensors = None
        if self._failure is None:
            try:
                tensors, self._records[key] = compress_weight(weight, target, self.quantization_config.seed)
            except Exception as error:
                # transformers would log this, go on, and end with an error that says nothing. Raised after loading.
                self._failure = error
        if tensors is None:
            tensors = {
                name.rpartition(".")[2]: torch.zeros(stored.shape, dtype=stored.dtype)
                for name, stored in tensors_of(target).items()
            }
        if target.kind == "experts":
            delattr(model.get_submodule(target.name), target.matrix)
            if missing is not None:
                missing.discard(key)
        prefix = module_of(target)
        return {
            f"{prefix}.{name}": nn.Parameter(tensor.to(weight.device), requires_grad=False)
            for name, tensor in tensors.items()
        }

    # When they are there.

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._failure is not None:
            raise self._failure
        config = self.quantization_config
        if not self.pre_quantized and self.report is None:
            if config.calibrated:
                shown = is_progress_bar_enabled()
                self.compress_in_place(model, self._batches, TqdmProgress() if shown else None)
                self._batches = []
            else:
                self._finish_loading(model)
        self._settle(model)
        if config.dequantize:
            self._dequantize(model)
            self.remove_quantization_config(model)
        return model

    def _finish_loading(self, model: Any) -> None:
        """Deal with placeholders that no weight came for, and put the records in order."""
        assert self.targets is not None, "targets are chosen before loading"
        config = self.quantization_config
        for key, target in self._pending.items():
            if key in self._records:
                continue
            placeholder = model.get_submodule(target.name)
            if self._missing is not None and key not in self._missing:
                # It came together with other weights, in one tensor that transformers took apart.
                tensors, self._records[key] = compress_weight(placeholder.weight, target, config.seed)
                fill(placeholder, tensors, placeholder.weight.device)
            elif target.kind == "linear":
                # A head that this class adds to the model that was saved; transformers has initialised it.
                model.set_submodule(target.name, plain_linear(placeholder))
                self.targets.compressed.remove(target)
                self.targets.skipped[target.name] = "not in the checkpoint, newly initialised"
            else:
                raise CompressionError(f"the checkpoint has no {key}. Load it without compression to see what it has.")
        self.report = CompressionReport.for_targets(self.targets)
        for target in self.targets.compressed:
            self.report.layers += self._records[f"{target.name}.{target.matrix}"]
        self.report.seconds = time.monotonic() - self._started
        self.report.calibration = {"method": "data-free", "sequences": 0, "tokens": 0}
        self._records, self._pending = {}, {}

    def compress_in_place(
        self, model: Any, batches: Iterable[Batch] | None, progress: Progress | None = None
    ) -> CompressionReport:
        """Compress a model that is loaded; None for `batches` is without data."""
        config = self.quantization_config
        reasons = self._choose(model)
        self.report = compress(
            model,
            batches,
            config.spec,
            skip=list(reasons),
            reasons=reasons,
            sequential=config.sequential,
            progress=progress,
            install_experts=install_stack,
        )
        return self.report

    def _settle(self, model: Any) -> None:
        """From here on the model is a compressed one, however it came to be."""
        config = self.quantization_config
        for module in model.modules():
            if isinstance(module, LRQLinear | LRQExpertStack):
                module.backend, module.activation = config.backend, config.activation
            if owns_stacks(module):
                use_stacks(module)
            elif isinstance(module, LRQLinear | LRQExpertStack):
                module.requires_grad_(False)
        if config.fuse and not config.dequantize:
            fused = fuse_layers(model)
            logger.info("hf_lrq: layers are computed together in %d modules", len(fused))
        compressed_here = not self.pre_quantized
        self.pre_quantized = True
        self._pending = {}
        if compressed_here:
            self.recipe = {**config.options(), "dataset": described(config.dataset)}
        config.dataset = config.tokenizer = None  # Neither is needed again, and both can be large.
        self._describe(model)
        spare_on_save(model, self._compressed_keys())
        bind_saving(model)
        if self.targets is not None:
            logger.log(logging.WARNING if compressed_here else logging.INFO, "hf_lrq: %s", self.targets.summary())
            for name, reason in self.targets.skipped.items():
                logger.info("hf_lrq: %s is not compressed: %s", name, reason)
        if compressed_here and self.report is not None:
            for warning in self.report.warnings:
                logger.warning("hf_lrq: %s", warning)

    def _describe(self, model: Any) -> None:
        """Make the config say what the modules of the model are, in the names of the files."""
        layouts: dict[str, LayerLayout] = {}
        alone = []
        for name, module in model.named_modules():
            if isinstance(module, LRQLinear | LRQExpertStack):
                layouts[f"{name}.weight"] = module.layout
            elif is_candidate(module):
                alone.append(f"{name}.weight")
        stored = names_in_files((*layouts, *alone), model)
        layouts = {stored[key].removesuffix(".weight"): layout for key, layout in layouts.items()}
        alone = [stored[key].removesuffix(".weight") for key in alone]
        config = self.quantization_config
        if config.header is not None:
            default = config.header.default
        else:
            spec = config.spec.default
            default = spec.layout
            if spec.codebook == "auto":
                # It fits each matrix; what most of those with these bits got need not be said of each.
                books = Counter(layout.codebook for layout in layouts.values())
                fitting = [name for name in books if get_codebook(name).bits == spec.bits]
                default = replace(default, codebook=max(fitting, key=books.__getitem__, default=default.codebook))
        config.header = QuantizationHeader.of(default, layouts, alone)

    def _compressed_keys(self) -> list[str]:
        """Full names of the tensors of compressed modules that uncompressed ones have as well."""
        names = [module_of(target) for target in (self.targets.compressed if self.targets is not None else [])]
        return [f"{name}.{key}" for name in names for key in ("weight", "bias")]


def compress_pretrained(
    model: Any,
    batches: Iterable[Batch] | None = None,
    config: LRQConfig | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress a loaded model in place; afterwards it saves and loads like one that was compressed while loading.

    Args:
        model: a PreTrainedModel. Where an error stops the work, some of its layers may be compressed already.
        batches: calibration inputs, see `calibration.batches.Batch`; None takes those that the config asks for, and
            compresses without data if it asks for none.
        config: what to do; None takes the defaults.
        progress: told about each step.

    Raises:
        SpecError: if the model is quantized already.
        CompressionError: if a weight holds NaN or Inf, or if there is nothing to compress.
        CalibrationError: if the calibration data cannot support the request.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise SpecError(f"this {type(model).__name__} is quantized already. Load the original model.")
    quantizer = LRQHfQuantizer(config if config is not None else LRQConfig(), pre_quantized=False)
    quantizer.base_model = model.config._name_or_path or None
    if batches is None and quantizer.quantization_config.calibrated:
        batches = calibration_batches(model, quantizer.quantization_config)
    report = quantizer.compress_in_place(model, batches, progress)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    quantizer.postprocess_model(model)
    return report


def _refuse_tensor_parallelism(model: Any) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    if distributed is not None and (getattr(distributed, "tp_size", None) or 1) > 1:
        raise SpecError("Tensor parallelism is not supported for compressed layers. Leave tp_plan and tp_size out.")


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
