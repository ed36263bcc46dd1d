"""Every name of transformers, PEFT and accelerate that this package touches beyond their documented interface: a table.

Nothing here runs. `tests/contracts/test_host_internals.py` looks each name up in the installed hosts, and finds names
that the package uses and the table lacks. When a host changes, the row says who used the name and what for.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HostName:
    """One name of a host.

    Attributes:
        name: dotted, from the host's top module. Of kind "attribute" it may be one that only instances have: the source
            of its owner, a class or a module, then speaks of it.
        kind: "module", "class", "function" or "attribute".
        used_in: packages below `hf_lrq/`.
        why: what for.
        takes: parameters of a function, in the order in which they are given; "|" stands between names of the same one.
        since: the first release of the host that has it, where the oldest one supported does not.
    """

    name: str
    kind: str
    used_in: tuple[str, ...]
    why: str
    takes: tuple[str, ...] = ()
    since: str = "0"

    @property
    def host(self) -> str:
        """Name of the library."""
        return self.name.partition(".")[0]


_HOSTED, _ADAPTERS = ("integrations",), ("integrations/peft",)


def _quantizer(name: str, why: str, *takes: str, kind: str = "function", since: str = "0") -> HostName:
    return HostName(f"transformers.quantizers.base.HfQuantizer.{name}", kind, _HOSTED, why, takes, since)


def _tuner(name: str, why: str, *takes: str, kind: str = "function") -> HostName:
    return HostName(f"peft.tuners.tuners_utils.BaseTuner.{name}", kind, _ADAPTERS, why, takes)


def _tuner_layer(name: str, why: str, *takes: str, kind: str = "function") -> HostName:
    return HostName(f"peft.tuners.tuners_utils.BaseTunerLayer.{name}", kind, _ADAPTERS, why, takes)


def _lora(name: str, why: str, *takes: str, kind: str = "function") -> HostName:
    return HostName(f"peft.tuners.lora.{name}", kind, _ADAPTERS, why, takes)


def _experts(name: str, why: str, *used_in: str, since: str = "0") -> HostName:
    return HostName(f"transformers.integrations.moe.{name}", "attribute", used_in, why, (), since)


TRANSFORMERS = (
    # Registration.
    HostName("transformers.quantizers.auto", "module", _HOSTED, "its import is awaited; it holds the tables below"),
    HostName("transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING", "attribute", ("cli", *_HOSTED), "register again"),
    HostName(
        "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING",
        "attribute",
        ("cli", *_HOSTED),
        "register again",
    ),
    HostName("transformers.quantizers.auto.register_quantizer", "function", _HOSTED, "registration", ("name",)),
    HostName(
        "transformers.quantizers.auto.register_quantization_config", "function", _HOSTED, "registration", ("method",)
    ),
    HostName(
        "transformers.quantizers.auto.AutoHfQuantizer.merge_quantization_configs",
        "function",
        _HOSTED,
        "wrapped: it drops what a user passes beside the config of a compressed checkpoint",
        ("quantization_config", "quantization_config_from_args"),
    ),
    HostName("transformers.utils.quantization_config.QuantizationConfigMixin", "class", _HOSTED, "base of LRQConfig"),
    HostName(
        "transformers.trainer.Trainer.train",
        "function",
        _HOSTED,
        "wrapped: it would train what is not compressed alone",
    ),
    HostName("transformers.training_args.OptimizerNames", "class", _HOSTED, "gets members for the optimizers"),
    HostName("transformers.trainer_optimizer._OPTIMIZER_HANDLERS", "attribute", _HOSTED, "gets their handlers"),
    HostName("transformers.trainer._OPTIMIZER_HANDLERS", "attribute", _HOSTED, "whether the Trainer looks there"),
    HostName(
        "transformers.training_args.TrainingArguments.fsdp_plugin_args", "attribute", _HOSTED, "which FSDP is asked for"
    ),
    # The quantizer: called by from_pretrained and save_pretrained.
    HostName("transformers.quantizers.base.HfQuantizer", "class", _HOSTED, "base of LRQHfQuantizer"),
    _quantizer("requires_calibration", "compression needs no data", kind="attribute"),
    _quantizer("pre_quantized", "whether the checkpoint is compressed already", kind="attribute"),
    _quantizer("validate_environment", "refuses offloading"),
    _quantizer("update_device_map", "chooses a GPU", "device_map"),
    _quantizer("update_dtype", "dtype of uncompressed tensors", "dtype"),
    _quantizer("param_needs_quantization", "what is compressed as it is loaded", "model", "param_name"),
    _quantizer("param_element_size", "bytes for device_map='auto'", "model", "param_name", "param"),
    _quantizer("get_quantize_ops", "the operation on loaded weights"),
    _quantizer("update_weight_conversions", "spares compressed tensors", "weight_conversions", since="5.8"),
    _quantizer("is_serializable", "saving is allowed"),
    _quantizer("is_trainable", "adapters are allowed", kind="attribute"),
    _quantizer("is_qat_trainable", "training is allowed", kind="attribute"),
    _quantizer("is_compileable", "torch.compile is allowed", kind="attribute"),
    _quantizer("get_state_dict_and_metadata", "the moment before config.json is written", "model"),
    _quantizer("remove_quantization_config", "a dequantized model", "model"),
    _quantizer("_dequantize", "the way back", "model", "dtype"),
    _quantizer("_process_model_before_weight_loading", "puts empty layers in place", "model"),
    _quantizer("_process_model_after_weight_loading", "compresses with data; raises what went wrong", "model"),
    _quantizer("postprocess_model", "called for models compressed in place", "model"),
    # Loading and saving of weights.
    HostName("transformers.core_model_loading.ConversionOps", "class", _HOSTED, "base of CompressOnLoad"),
    HostName(
        "transformers.core_model_loading.ConversionOps.convert", "function", _HOSTED, "compresses", ("input_dict",)
    ),
    HostName("transformers.core_model_loading.WeightRenaming", "class", _HOSTED, "names in files"),
    HostName("transformers.core_model_loading.WeightConverter", "class", _HOSTED, "rearranged weights"),
    HostName("transformers.core_model_loading.WeightRenaming.reverse_transform", "function", _HOSTED, "names in files"),
    HostName(
        "transformers.core_model_loading.WeightConverter.reverse_transform", "function", _HOSTED, "what saving undoes"
    ),
    HostName(
        "transformers.core_model_loading.WeightConverter.rename_source_key",
        "function",
        _HOSTED,
        "whether a tensor is rearranged on saving",
        ("source_key",),
    ),
    HostName(
        "transformers.core_model_loading.rename_source_key",
        "function",
        _HOSTED,
        "names in files to names in the model and back",
        ("source_key", "weight_renamings", "weight_converters", "prefix|base_model_prefix", "meta_state_dict"),
    ),
    HostName(
        "transformers.core_model_loading.PrefixChange", "class", _HOSTED, "left out when saving; by name", since="5.6"
    ),
    HostName(
        "transformers.conversion_mapping.get_model_conversion_mapping",
        "function",
        _HOSTED,
        "how a model's weights are renamed and rearranged",
        ("model", "add_legacy"),
    ),
    HostName(
        "transformers.core_model_loading._weight_conversions", "attribute", _HOSTED, "what saving a model will undo"
    ),
    HostName(
        "transformers.modeling_utils.remove_tied_weights_from_state_dict",
        "function",
        _HOSTED,
        "which tensors saving leaves out",
        ("state_dict", "model"),
    ),
    HostName(
        "transformers.modeling_utils.PreTrainedModel._keys_to_ignore_on_save",
        "attribute",
        _HOSTED,
        "which tensors saving leaves out",
    ),
    HostName(
        "transformers.integrations.accelerate.load_offloaded_parameter",
        "function",
        _HOSTED,
        "values of tensors that are offloaded to the disk",
        ("model", "param_name"),
    ),
    HostName(
        "transformers.modeling_utils._is_hf_initialized",
        "attribute",
        ("nn", "work"),
        "keeps transformers from initialising codes that lie under `weight`",
    ),
    HostName(
        "transformers.modeling_utils.PreTrainedModel._init_weights",
        "attribute",
        _HOSTED,
        "its code shows whether loading rescales weights",
    ),
    HostName(
        "transformers.modeling_utils.PreTrainedModel._keep_in_fp32_modules", "attribute", _HOSTED, "left uncompressed"
    ),
    HostName(
        "transformers.modeling_utils.PreTrainedModel._keep_in_fp32_modules_strict",
        "attribute",
        _HOSTED,
        "left uncompressed",
    ),
    HostName(
        "transformers.modeling_utils.PreTrainedModel.all_tied_weights_keys",
        "attribute",
        ("work", *_HOSTED),
        "tied weights are left uncompressed or share their codes, and are counted once",
    ),
    HostName(
        "transformers.modeling_utils.PreTrainedModel._tied_weights_keys",
        "attribute",
        _HOSTED,
        "gets the scales of tied tables of codes, so that they are tied and saved once as the codes are",
    ),
    HostName(
        "transformers.modeling_utils.PreTrainedModel.dtype",
        "attribute",
        _HOSTED,
        "replaced: it would be that of a factor where one comes first",
    ),
    HostName("transformers.modeling_utils.hf_quantizer", "attribute", ("cli", *_HOSTED), "the quantizer of a model"),
    HostName(
        "transformers.modeling_utils.hf_device_map", "attribute", (*_HOSTED, *_ADAPTERS), "which layers are offloaded"
    ),
    HostName("transformers.quantizers.base.is_quantized", "attribute", _HOSTED, "set on a model compressed in place"),
    HostName("transformers.quantizers.base.quantization_method", "attribute", _HOSTED, "set beside it"),
    HostName(
        "transformers.integrations.peft.PeftAdapterMixin._hf_peft_config_loaded",
        "attribute",
        _HOSTED,
        "a model with adapters saves these alone",
    ),
    HostName(
        "transformers.configuration_utils.PreTrainedConfig._name_or_path", "attribute", _HOSTED, "the original's name"
    ),
    HostName("transformers.modeling_utils.distributed_config", "attribute", _HOSTED, "tensor parallelism is refused"),
    # Modules.
    HostName("transformers.pytorch_utils.Conv1D", "class", ("work",), "the transposed linear of GPT-2"),
    _experts("_apply_gate", "the activation between the two stacks of fused experts", "calibration", "nn"),
    _experts("is_transposed", "how the stacks of fused experts are stored", "nn"),
    _experts("is_concatenated", "own code runs where false, unless the gate is the class's own", "nn", since="5.7"),
    _experts("has_gate", "own code runs where false", "nn", since="5.3"),
    _experts("has_post_expert_norm", "own code runs where true", "nn", since="5.20"),
    # The command line.
    HostName(
        "transformers.models.auto.auto_factory._BaseAutoModelClass._model_mapping",
        "attribute",
        ("cli",),
        "whether a config is that of a causal language model",
    ),
    HostName("transformers.cli.serve.Serve", "class", ("cli",), "whether its server takes a model as an argument"),
    HostName("transformers.generation.streamers.BaseStreamer", "class", ("cli",), "when the first token came"),
    HostName("transformers.utils.logging.is_progress_bar_enabled", "function", _HOSTED, "whether to show ours"),
)

PEFT = (
    # Registration.
    HostName("peft.mapping_func", "module", _HOSTED, "its import is awaited"),
    HostName("peft.PeftType", "class", _ADAPTERS, "gets a member"),
    HostName(
        "peft.get_peft_model_state_dict",
        "function",
        _ADAPTERS,
        "what is saved of an adapter",
        ("model", "adapter_name", "save_embedding_layers"),
    ),
    HostName("peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING", "attribute", _ADAPTERS, "register again"),
    HostName("peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING", "attribute", _ADAPTERS, "register again"),
    HostName("peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING", "attribute", _ADAPTERS, "register again"),
    HostName(
        "peft.utils.peft_types.register_peft_method",
        "function",
        _ADAPTERS,
        "registration",
        ("name", "config_cls", "model_cls", "prefix"),
    ),
    # The tuner.
    HostName("peft.tuners.tuners_utils.BaseTuner", "class", _ADAPTERS, "base of LRQAdapterModel"),
    _tuner("prefix", "of the names of an adapter's tensors", kind="attribute"),
    _tuner("tuner_layer_cls", "what PEFT recognises an adapted layer by", kind="attribute"),
    _tuner("target_module_mapping", "default targets by architecture: none", kind="attribute"),
    _tuner("_prepare_adapter_config", "chooses the layers", "peft_config", "model_config"),
    _tuner(
        "_create_and_replace",
        "adapts one layer",
        "peft_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
    ),
    _tuner("_check_merge_allowed", "refuses offloaded layers"),
    _tuner("_replace_module", "puts an adapted layer in place", "parent", "child_name", "new_module", "child"),
    _tuner("__init__", "wrapped: refuses methods that need weights", "model", "peft_config", "adapter_name"),
    _tuner("inject_adapter", "makes sums of adapters; wrapped like __init__", "model", "adapter_name"),
    _tuner("merge_adapter", "wrapped: all layers or none", "adapter_names"),
    _tuner("_unload_and_optionally_merge", "wrapped: all layers or none", "merge", "adapter_names"),
    _tuner("_cast_adapter_dtype", "autocast_adapter_dtype", "adapter_name", "autocast_adapter_dtype"),
    HostName("peft.tuners.MixedModel", "class", _ADAPTERS, "wrapped like BaseTuner"),
    HostName("peft.peft_model.PeftModel._enable_peft_forward_hooks", "function", _ADAPTERS, "asks for mixed batches"),
    HostName("peft.utils.ModulesToSaveWrapper", "class", _ADAPTERS, "takes adapter_names, too"),
    HostName("peft.tuners.tuners_utils.BaseTunerLayer", "class", _ADAPTERS, "base of LRQAdapterLayer"),
    _tuner_layer("adapter_layer_names", "containers of what is trained", kind="attribute"),
    _tuner_layer("other_param_names", "containers of what is kept", kind="attribute"),
    _tuner_layer("merged_adapters", "which adapters are merged", kind="attribute"),
    _tuner_layer("_active_adapter", "set on a new layer", kind="attribute"),
    _tuner_layer("_disable_adapters", "set on a new layer", kind="attribute"),
    _tuner_layer("get_base_layer", "the compressed layer"),
    _tuner_layer("set_adapter", "what requires gradients", "adapter_names", "inference_mode"),
    _tuner_layer("_cast_input_dtype", "dtype of the pair that stands outside", "x", "dtype"),
    _tuner_layer("_move_adapter_to_device_of_base_layer", "after it is made", "adapter_name"),
    _tuner_layer("supports_lora_conversion", "answered yes", "adapter_name"),
    HostName(
        "peft.tuners.tuners_utils.check_target_module_exists",
        "function",
        _ADAPTERS,
        "whether a config targets a module",
        ("config", "key"),
    ),
    HostName(
        "peft.tuners.tuners_utils.check_adapters_to_merge",
        "function",
        _ADAPTERS,
        "which are not merged yet",
        ("module", "adapter_names"),
    ),
    # LoRA on compressed layers.
    _lora("LoraModel", "taught about compressed layers", kind="class"),
    _lora(
        "LoraModel._create_new_module",
        "wrapped: gives the layer exact merging",
        "lora_config",
        "adapter_name",
        "target",
    ),
    _lora("LoraModel._check_new_adapter_config", "wrapped: refuses what needs the full weight", "config"),
    _lora("LoraModel._check_merge_allowed", "wrapped: refuses offloaded layers, and embeddings of codes"),
    _lora("layer.Linear", "base of LRQLoraLinear", kind="class"),
    _lora("layer.Linear.lora_A", "the second factor", kind="attribute"),
    _lora("layer.Linear.lora_B", "the first factor", kind="attribute"),
    _lora("layer.Linear.scaling", "of the product", kind="attribute"),
    _lora("layer.Linear.lora_variant", "refused in merges", kind="attribute"),
    _lora("layer.Linear.lora_bias", "refused in merges", kind="attribute"),
)

ACCELERATE = (
    HostName(
        "accelerate.hooks._hf_hook", "attribute", ("calibration", *_HOSTED, *_ADAPTERS), "moves weights and inputs"
    ),
    HostName("accelerate.hooks.add_hook_to_module", "function", _HOSTED, "moves a hook", ("module", "hook")),
    HostName("accelerate.hooks.remove_hook_from_module", "function", _HOSTED, "moves a hook", ("module",)),
    HostName("accelerate.hooks.AlignDevicesHook.weights_map", "attribute", _HOSTED, "what is offloaded to the disk"),
    HostName("accelerate.utils.offload.PrefixedDataset.dataset", "attribute", _HOSTED, "of all layers"),
    HostName("accelerate.utils.offload.OffloadedWeightsLoader.index", "attribute", _HOSTED, "where, in which dtype"),
    HostName("accelerate.hooks.SequentialHook", "class", _ADAPTERS, "several hooks in one"),
    HostName("accelerate.hooks.SequentialHook.hooks", "attribute", _ADAPTERS, "those"),
    HostName("accelerate.hooks.AlignDevicesHook.offload", "attribute", _ADAPTERS, "whether a layer is offloaded"),
)

HOST_NAMES = (*TRANSFORMERS, *PEFT, *ACCELERATE)
