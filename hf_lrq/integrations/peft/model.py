"""The tuner: puts adapters around layers that are compressed, or of bitsandbytes, and all PEFT does with them then."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from hf_lrq.checks import check_number
from hf_lrq.decomposition import generator_for
from hf_lrq.errors import CheckpointError, SpecError, did_you_mean
from hf_lrq.factors import concatenated, least_ranks
from hf_lrq.integrations.peft.bitsandbytes import BitsAndBytesAdapterLinear, check_none_is_merged
from hf_lrq.integrations.peft.config import LRQAdapterConfig
from hf_lrq.integrations.peft.first_gradients import groups_of, mean_gradients
from hf_lrq.integrations.peft.layer import AdapterLinear, LRQAdapterLayer, LRQAdapterLinear
from hf_lrq.integrations.peft.mixed import told_to_layers
from hf_lrq.integrations.peft.modes import parse_mode
from hf_lrq.integrations.peft.offloading import check_none_is_offloaded
from hf_lrq.integrations.peft.peft_type import PREFIX
from hf_lrq.integrations.peft.targets import chosen_layers, fingerprints, layers_of, ranks_of
from hf_lrq.integrations.peft.variants import AppendCore, first_step
from hf_lrq.matrices import Pair
from hf_lrq.nn import LRQLinear


class LRQAdapterModel(BaseTuner):
    """A model whose compressed linear layers are adapted; made by `peft.get_peft_model(model, LRQAdapterConfig())`.

    Args:
        model: with compressed layers.
        config: an LRQAdapterConfig, or several by adapter name.
        adapter_name: of the adapter to make.
    """

    prefix = PREFIX
    tuner_layer_cls = LRQAdapterLayer
    target_module_mapping: Mapping[str, Any] = {}
    _may_draw = False  # Whether an adapter draws its passes, see `Mode.drawn`.

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_check_loaded)

    def _prepare_adapter_config(self, peft_config: LRQAdapterConfig, model_config: dict[str, Any]) -> LRQAdapterConfig:
        """Choose the layers, and find all that is wrong with the choice before anything is changed."""
        chosen = chosen_layers(peft_config, self.model)
        peft_config.remember(fingerprints(chosen, ranks_of(self.model)))
        peft_config.target_modules = set(chosen)
        # PEFT shortens the names of many targets; endings could also fit other layers.
        self._chosen = frozenset(chosen)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: LRQAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key not in self._chosen:
            return
        adapted = target if isinstance(target, AdapterLinear) else adapter_around(target)
        if adapted is not target:
            adapted._active_adapter = self.active_adapter
        mode = peft_config.mode_for(current_key)
        self._may_draw = self._may_draw or mode.draws
        adapted.update_layer(
            adapter_name,
            mode,
            generator_for(peft_config.seed, current_key),
            randomly=peft_config.init == "random",
            inference_mode=peft_config.inference_mode,
        )
        if adapted is not target:
            if adapter_name not in self.active_adapters:
                adapted.requires_grad_(False)
            self._replace_module(parent, target_name, adapted, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in place. Adapters are made where their layer is, and a layer of bitsandbytes must not be moved.

        PEFT moves it, to where it is, and an Int8Params that has been used loses its scales by that (0.50).
        """
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are made in float32; without autocast they get the dtype that the rest of the model has."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        dtype = running_dtype(self.model)
        for module in self.model.modules():
            if isinstance(module, AdapterLinear):
                for tensor in module.own(adapter_name).values():
                    tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns; in training, modes that draw their passes draw one, for all layers together."""
        if self._may_draw:
            self._begin_pass()
        return super().forward(*args, **kwargs)

    def _begin_pass(self) -> None:
        drawing: dict[str, list[AdapterLinear]] = {}
        for layer in self.model.modules():
            if isinstance(layer, AdapterLinear):
                layer.levels.clear()
                for adapter in layer.drawing(self.active_adapters):
                    drawing.setdefault(adapter, []).append(layer)
        # What no gradient is taken of trains nothing.
        if self.training and torch.is_grad_enabled():
            for adapter, layers in drawing.items():
                self._draw(adapter, layers)

    def _draw(self, adapter: str, layers: Sequence[AdapterLinear]) -> None:
        # The count is saved with the adapter, so that training that is resumed goes on as it would have.
        step = layers[0].steps(adapter)
        generator = generator_for(self.peft_config[adapter].seed, f"step/{step}")
        level = torch.rand((), generator=generator).item()
        for layer in layers:
            layer.take_step(adapter, level)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """What PEFT enters around every call to the model."""
        return told_to_layers(self.model, AdapterLinear, list(self.peft_config), kwargs)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        check_none_is_offloaded(self.model, layers_of(self.model), "merged")
        check_none_is_merged(self.model)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **lossy: Any,
    ) -> None:
        """Make a new adapter that adds to each layer the weighted sum of what others add; exact, as ranks concatenate.

        Args:
            adapters: names, of any modes.
            weights: one for each; negative ones subtract.
            adapter_name: of the new one; it has mode "append:r" and, like any other that is added, is not active.
            combination_type: "cat"; there is no approximation to choose.
            lossy: options of LoRA's approximations (`density`, `svd_rank`, ...), which are refused.

        Raises:
            SpecError: on a name that is unknown, given twice, or taken; on weights that do not match; if one of the
                adapters also trains whole modules.
        """
        self._check_combination(adapters, weights, adapter_name, combination_type)
        given = [name for name, value in lossy.items() if value is not None]
        if given:
            raise SpecError(f"{', '.join(given)}: sums of adapters are exact (combination_type='cat'); leave it out.")
        pairs: dict[str, Pair] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, AdapterLinear):
                held = [(a, float(w)) for a, w in zip(adapters, weights, strict=True) if module.holds(a)]
                if held:
                    changes = [(module.outer_change_of(adapter), weight) for adapter, weight in held]
                    pairs[name] = least_ranks(*concatenated([(L * weight, R) for (L, R), weight in changes]))
        pairs = {name: pair for name, pair in pairs.items() if pair[0].shape[1]}
        if not pairs:
            raise SpecError(f"{', '.join(adapters)}: nothing is added to any layer, as no rank is left.")
        ranks = {name: L.shape[1] for name, (L, _) in pairs.items()}
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            mode=f"append:{max(ranks.values())}",
            target_modules=list(pairs),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern=ranks,
            active_rank=None,
            init="zero",
            base_layers=None,
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for name, pair in pairs.items():
            for factor, values in zip(("lrq_L", "lrq_R"), pair, strict=True):
                self.model.get_submodule(name).get_parameter(f"{factor}.{adapter_name}").data.copy_(values)

    def start_from_gradients(
        self, batches: Sequence[Mapping[str, Any]], learning_rate: float, adapter_name: str = "default"
    ) -> None:
        """Start an adapter of mode "append-core:r" with the first step of full fine-tuning (LoRA-SB, 2024).

        B and A become the leading singular vectors of the mean gradient of the loss by each weight, and stay as they
        are; the core between them, which is trained, becomes the step itself, -learning_rate times the singular values.

        Args:
            batches: arguments of the model, labels included; some fifty examples are enough.
            learning_rate: of that step.
            adapter_name: of an active adapter.

        Raises:
            SpecError: if there is no such adapter, it is of another mode or not active, or there is no batch.
            CalibrationError: if the model returns no loss, or gradients are not finite.
        """
        mode = self.peft_config[adapter_name].mode if adapter_name in self.peft_config else None
        if mode is None or not isinstance(parse_mode(mode), AppendCore) or adapter_name not in self.active_adapters:
            what = "there is none of that name" if mode is None else f"this is {mode!r}, and it has to be active"
            raise SpecError(f"adapter {adapter_name!r}: start_from_gradients is for mode 'append-core:r'; {what}.")
        check_number("learning_rate", learning_rate, 0.0, float("inf"))
        if not batches:
            raise SpecError("there is no batch to take gradients of. Give at least one.")
        layers = [module for module in self.model.modules() if isinstance(module, AdapterLinear)]
        # Set at the end: all gradients are those of the model as it is.
        starts: dict[AdapterLinear, dict[str, Tensor]] = {}
        for group in groups_of([layer for layer in layers if layer.holds(adapter_name)]):
            for layer, G in zip(group, mean_gradients(self.model, group, adapter_name, batches), strict=True):
                starts[layer] = first_step(G, len(layer.own(adapter_name)["lrq_C"]), learning_rate)
        for layer, start in starts.items():
            for name, value in start.items():
                layer.own(adapter_name)[name].data.copy_(value)

    def _check_combination(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
    ) -> None:
        known = list(self.peft_config)
        if not adapters or len(adapters) != len(weights):
            raise SpecError(f"Give one weight for each adapter: got {len(adapters)} and {len(weights)}.")
        for name in adapters:
            if name not in known:
                raise SpecError(
                    f"There is no adapter {name!r}.{did_you_mean(name, known)} Adapters: {', '.join(known)}."
                )
            if self.peft_config[name].modules_to_save:
                raise SpecError(f"{name!r} also trains whole modules (modules_to_save), which cannot be added up.")
        if len(set(adapters)) < len(adapters):
            raise SpecError(f"An adapter is given twice: {', '.join(adapters)}. Add up its weights.")
        if adapter_name in known:
            raise SpecError(f"There is an adapter {adapter_name!r} already. Choose another name, or delete it first.")
        if combination_type != "cat":
            raise SpecError(
                f"combination_type must be 'cat', which is exact; got {combination_type!r}. PEFT's approximations are "
                "for its LoRA: LoraConfig adapters on the same model take them."
            )


def adapter_around(layer: nn.Module) -> AdapterLinear:
    """A layer that takes adapters, around one of those that `chosen_layers` chooses."""
    if isinstance(layer, LRQLinear):
        return LRQAdapterLinear(layer)
    return BitsAndBytesAdapterLinear(cast(nn.Linear, layer))


def running_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of what is not compressed and no adapter: that of activations."""
    skipped = {id(p) for m in model.modules() if isinstance(m, LRQLinear | AdapterLinear) for p in m.parameters()}
    floats = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in skipped)
    return next(floats, torch.float32)


def _check_loaded(tuner: LRQAdapterModel, keys: Any) -> None:
    """After `load_state_dict`: refuse adapters of which something matched nothing, or something is missing.

    PEFT itself passes over the former and warns of the latter. What it loads is one adapter; all other parameters are
    missing then, and an adapter of which nothing was given is another one.

    Raises:
        CheckpointError: naming the first.
    """
    own: dict[str, set[str]] = {}
    for name, module in tuner.named_modules():
        if isinstance(module, AdapterLinear):
            for adapter in module.modes:
                own.setdefault(adapter, set()).update(f"{name}.{kind}.{adapter}" for kind in module.own(adapter))
    known = set().union(*own.values())
    missing = {name for key in keys.missing_keys if (name := _name_in_tuner(key)) in known}
    unexpected = [_name_in_tuner(key) for key in keys.unexpected_keys if f".{PREFIX}" in key]
    partly = [min(lost) for names in own.values() if 0 < len(lost := names & missing) < len(names)]
    for what, names in (("matches nothing in the model", unexpected), ("is missing", partly)):
        if names:
            more = f" ({len(names) - 1} more like it.)" if len(names) > 1 else ""
            raise CheckpointError(
                f"The file does not hold the tensors of this adapter: {min(names)} {what}.{more} adapter_config.json "
                "and adapter_model.safetensors are of different adapters, or one was edited."
            )


def _name_in_tuner(key: str) -> str:
    """The name of a parameter within the tuner, which PEFT's models call `base_model`."""
    return key.removeprefix("_orig_mod.").removeprefix("base_model.")
