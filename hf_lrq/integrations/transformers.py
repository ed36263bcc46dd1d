"""The quantizer that transformers runs: compress while loading, load compressed checkpoints, save them again."""

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.logging import is_progress_bar_enabled

from hf_lrq.calibration import Batch, Progress, TqdmProgress, check_data
from hf_lrq.checkpoint import QUANT_METHOD
from hf_lrq.errors import SpecError
from hf_lrq.integrations.calibration_data import calibration_batches, described
from hf_lrq.integrations.carrying_out import carry_out
from hf_lrq.integrations.compress_on_load import CompressOnLoad, LoadingCompression
from hf_lrq.integrations.config import LRQConfig, stored_header
from hf_lrq.integrations.conversions import keep_arrangement, without_rearranging
from hf_lrq.integrations.decompression import decompress, decompress_tables
from hf_lrq.integrations.dtypes import keep_dtypes_on_disk, report_uncompressed_dtype
from hf_lrq.integrations.loading import check_values, default_layout, empty_layers, header_of_model
from hf_lrq.integrations.planning import plan_for, without_read
from hf_lrq.integrations.provenance import Provenance
from hf_lrq.integrations.resizing import bind_resizing, unbind_resizing
from hf_lrq.integrations.saving import bind_saving, unbind_saving
from hf_lrq.integrations.skip_rules import only_in_training
from hf_lrq.integrations.stored_state import note_trained_rotations, state_and_metadata
from hf_lrq.integrations.tables import tie_scales, untie_scales
from hf_lrq.integrations.trial import check_reads, try_out
from hf_lrq.nn import LRQEmbedding, LRQExpertStack, LRQLinear, fuse_layers
from hf_lrq.nn.fused_experts import owns_stacks, use_stacks
from hf_lrq.nn.inference_path import keep_on_inference_path
from hf_lrq.work import CompressionReport, Inventory, Plan
from hf_lrq.work.plan import listed
from hf_lrq.work.sites import joined

__all__ = ["LRQConfig", "LRQHfQuantizer"]

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
            return quantization_config.with_user_options(wish)
    return _merge(quantization_config, quantization_config_from_args)


auto.AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_quantization_configs)
report_uncompressed_dtype()


@_registered(auto.register_quantizer, auto.AUTO_QUANTIZER_MAPPING)
class LRQHfQuantizer(HfQuantizer):
    """Works on a model in one of three ways.

    A compressed checkpoint: before loading, linear layers become empty compressed ones, once the headers of the files
    agree with config and model. An uncompressed one without calibration data: weights are compressed one by one as they
    are loaded. With calibration data: the model is loaded as it is and compressed afterwards.

    Attributes:
        inventory: what is compressed and what is not.
        provenance: where the compressed model comes from.
        original_names: whether the next save gives tensors the names of the original checkpoint.
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
        self.inventory = Inventory()
        self.provenance = Provenance()
        self.original_names = True
        self._dtype: torch.dtype | None = None
        # What is still to be done to an uncompressed model when its weights are there.
        self._loading: LoadingCompression | None = None
        self._afterwards: tuple[Plan, Sequence[Batch] | None] | None = None

    @property
    def report(self) -> CompressionReport | None:
        """What happened to each matrix, if the model was compressed in this process."""
        return self.provenance.report

    # What transformers asks.

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse placements that cannot work.

        Raises:
            SpecError: on offloading of a model that is to be compressed or decompressed here.
        """
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        config = self.quantization_config
        if "disk" in devices and not self.pre_quantized:
            offloaded = [name for name, device in device_map.items() if device == "disk"]
            raise SpecError(
                "A model cannot be compressed while parts of it are offloaded to disk: device_map sends "
                f"{listed(offloaded, 3)} there. Compress with device_map='cpu', save, and load the result with "
                "offloading."
            )
        elsewhere = "disk" in devices or ("cpu" in devices and len(devices) > 1)
        if elsewhere and (config.dequantize or (config.calibrated and not self.pre_quantized)):
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
        return self._loading is not None and self._loading.awaits(param_name)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element; for weights that will be compressed, of their codes."""
        size = None if self._loading is None else self._loading.element_size(param_name, param)
        return float(super().param_element_size(model, param_name, param)) if size is None else size

    def get_quantize_ops(self) -> CompressOnLoad:
        """The operation on weights that need quantization."""
        assert self._loading is not None, "no parameter needs quantization otherwise"
        return CompressOnLoad(self._loading)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Leave compressed tensors as they are in the file."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *args)
        return without_rearranging(conversions, self._compressed_keys()) if self.pre_quantized else conversions

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
        """Called by `save_pretrained` before it writes config.json: bring the config up to date with the modules."""
        note_trained_rotations(model)
        self._describe(model)
        return state_and_metadata(model, stored_header(self.quantization_config), self.original_names)

    def remove_quantization_config(self, model: Any) -> None:
        """Make it an ordinary model again."""
        super().remove_quantization_config(model)
        unbind_saving(model)
        unbind_resizing(model)
        untie_scales(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = dtype or self._dtype or model.dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return decompress(model, self.inventory.layouts, dtype)

    def _unpack_tables(self, model: Any) -> None:
        tables = [site for site in self.inventory.layouts if site.of_tables]
        decompress_tables(model, tables, self._dtype or model.dtype)
        untie_scales(model)
        self.inventory = self.inventory.without({site.label: "loaded with embedding_bits=16" for site in tables})

    # Before the weights are loaded.

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _refuse_tensor_parallelism(model)
        config = self.quantization_config
        if self.pre_quantized:
            files = kwargs.get("checkpoint_files") or []
            self.inventory = empty_layers(model, stored_header(config), files, config.verify)
            self.provenance.source = Path(files[0]).parent if files else None
            return model
        self.provenance.base_model = model.config._name_or_path or None
        config.check_data(config.calibrated)
        plan = plan_for(model, config)
        if config.calibrated or plan.open_to_weights:
            # Before hours of loading, as data and tokenizer can be missing; here new tensors would be on meta.
            with torch.device("cpu"):
                batches = calibration_batches(model, config) if config.calibrated else None
                self._afterwards = plan, batches
        else:
            check_data(None, bool(config.two_sided), config.budget_option)
            self._loading = LoadingCompression(model, plan)
        return model

    # When they are there.

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            check_values(model)
            keep_dtypes_on_disk(model)
            if self.quantization_config.plain_tables:
                self._unpack_tables(model)
        elif self._loading is not None:
            self.inventory, self.provenance.report = self._loading.finish(model)
            check_reads(model, try_out(model, self.inventory.layouts))
        elif self._afterwards is not None:
            plan, batches = self._afterwards
            self.compress_in_place(model, plan, batches, TqdmProgress() if is_progress_bar_enabled() else None)
        self._loading = self._afterwards = None
        self._make_compressed(model)
        if self.quantization_config.dequantize:
            self._dequantize(model)
            self.remove_quantization_config(model)
        return model

    def compress_in_place(
        self, model: Any, plan: Plan, batches: Iterable[Batch] | None, progress: Progress | None = None
    ) -> None:
        """Compress a model that is loaded; None for `batches` is without data."""
        plan, config = without_read(model, plan, will_run=batches is not None), self.quantization_config
        plan, self.provenance.report = carry_out(model, plan, batches, config, progress)
        self.inventory = plan.inventory
        check_reads(model, try_out(model, self.inventory.layouts))

    def _make_compressed(self, model: Any) -> None:
        """From here on the model is a compressed one, however it came to be."""
        config, compressed_here = self.quantization_config, not self.pre_quantized
        prepare_layers(model, config)
        self.pre_quantized = True
        if compressed_here:
            tie_scales(model, self.inventory.layouts)
            self.provenance.recipe = {**config.options(), "dataset": described(config.dataset)}
        config.dataset = config.tokenizer = None  # Neither is needed again, and both can be large.
        self._describe(model)
        keep_arrangement(model, self._compressed_keys())
        bind_saving(model)
        bind_resizing(model)
        logger.log(logging.WARNING if compressed_here else logging.INFO, "hf_lrq: %s", self.inventory.summary())
        for name, reason in self.inventory.left_alone.items():
            logger.info("hf_lrq: %s is not compressed: %s", name, reason)
        for warning in self.report.warnings if compressed_here and self.report is not None else ():
            logger.warning("hf_lrq: %s", warning)

    def _describe(self, model: Any) -> None:
        """Make the config say what the modules of the model are."""
        config = self.quantization_config
        default = default_layout(config.spec.default, model) if config.header is None else config.header.default
        config.header = header_of_model(model, default)

    def _compressed_keys(self) -> list[str]:
        """Full names of the tensors of compressed modules that uncompressed ones have as well."""
        return [joined(site.holder, key) for site in self.inventory.layouts for key in ("weight", "bias")]


def prepare_layers(model: Any, config: LRQConfig) -> None:
    """Make the compressed layers of a model ready for use: frozen, and computed as `config` says."""
    for module in model.modules():
        kind: Any = type(module)
        compressed = [name for name, child in module.named_children() if isinstance(child, LRQLinear)]
        if any(only_in_training(kind, name) for name in compressed):
            keep_on_inference_path(module)
        if owns_stacks(module):
            use_stacks(module)
        elif isinstance(module, LRQLinear | LRQExpertStack):
            module.backend, module.activation = config.backend, config.activation
            module.requires_grad_(False)
        elif isinstance(module, LRQEmbedding):
            module.requires_grad_(False)
    if config.fuse and not config.dequantize:
        fused = fuse_layers(model)
        logger.info("hf_lrq: layers are computed together in %d modules", len(fused))


def _refuse_tensor_parallelism(model: Any) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    if distributed is not None and (getattr(distributed, "tp_size", None) or 1) > 1:
        raise SpecError("Tensor parallelism is not supported for compressed layers. Leave tp_plan and tp_size out.")
