"""PEFT's methods other than LoRA on compressed layers: refused at once where they need the weight.

They take a compressed layer for an nn.Linear, which it is. Those that call it run; those that read its weight would get
codes. So weights are watched while a method is set up, and in one pass of one row through each kind of layer it makes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, mapping
from peft.tuners import MixedModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn

from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft.config import LRQAdapterConfig
from hf_lrq.integrations.peft.differences import WHAT_WORKS, MergesByDifference
from hf_lrq.integrations.peft.merging import MergesIntoFactors
from hf_lrq.integrations.peft.targets import layers_of
from hf_lrq.integrations.peft.undoing import all_or_nothing
from hf_lrq.integrations.peft.watching import Watch, is_watched, watched
from hf_lrq.integrations.peft.whole import check_none_is_trained_whole
from hf_lrq.integrations.peft.wrapping import wrap
from hf_lrq.integrations.trial import mixed
from hf_lrq.nn import LRQLinear


def adapt_others() -> None:
    """Teach all tuners of PEFT; it offers no way to do so. Idempotent."""
    wrap(BaseTuner, "__init__", _checked_init)
    tuners: set[Any] = {BaseTuner, MixedModel, *mapping.PEFT_TYPE_TO_TUNER_MAPPING.values()}
    for tuner in tuners:
        for name, make in (
            ("inject_adapter", _checked_injection),
            ("_create_and_replace", _naming_the_layer),
            ("merge_adapter", _all_or_nothing),
            ("_unload_and_optionally_merge", _all_or_nothing),
        ):
            if name in vars(tuner):
                wrap(tuner, name, make)


def _checked_init(original: Any) -> Callable[..., None]:
    def init(tuner: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        with checked(model, config):
            original(tuner, model, peft_config, adapter_name, *args, **kwargs)

    return init


def _checked_injection(original: Any) -> Callable[..., None]:
    def inject(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with checked(model, tuner.peft_config[adapter_name]):
            original(tuner, model, adapter_name, *args, **kwargs)

    return inject


def _naming_the_layer(original: Any) -> Callable[..., Any]:
    def create(tuner: Any, config: Any, adapter: str, target: Any, *args: Any, current_key: str, **kwargs: Any) -> Any:
        try:
            return original(tuner, config, adapter, target, *args, current_key=current_key, **kwargs)
        except Exception as error:
            if is_for_lora(config) or not isinstance(target, LRQLinear) or isinstance(error, SpecError):
                raise
            raise SpecError(failure(type(config).__name__, current_key, error)) from error

    return create


def _all_or_nothing(original: Any) -> Callable[..., Any]:
    def merge(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(tuner.model):
            return original(tuner, *args, **kwargs)

    return merge


def is_for_lora(config: Any) -> bool:
    """Whether the adapter is one of ours or PEFT's LoRA, which have checks and merges of their own."""
    return isinstance(config, LRQAdapterConfig) or type(config) is LoraConfig


def failure(method: str, name: str, error: Exception) -> str:
    """What to say of a layer that a method fails with."""
    return f"{method} does not run on {name}, which is compressed: {type(error).__name__}: {error}. {WHAT_WORKS}"


@contextmanager
def checked(model: nn.Module, config: Any) -> Iterator[None]:
    """While PEFT sets up an adapter: the model is left as it was if that fails, or must.

    Raises:
        SpecError: if compressed modules are to be trained themselves; if the method reads weights of compressed layers,
            fails with them, or passes over them.
    """
    check_none_is_trained_whole(model, config)
    layers = layers_of(model)
    if not layers or is_for_lora(config) or any(map(is_watched, layers.values())):
        yield
        return
    method = type(config).__name__
    with all_or_nothing(model), watched(layers) as trial:
        try:
            yield
            new = adapted_layers(model)
            try_out(new, method, trial)
        except Exception as error:
            check_reads(trial, method, error)
            raise
        check_reads(trial, method)
        check_none_is_passed_over(model, config)
    for name, module in new.items():
        kind: Any = type(module)
        module.__class__ = mixed(MergesByDifference, kind)
        module.place, module.method = name, method


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> layer of PEFT around a compressed one that cannot merge into it yet."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, MergesIntoFactors)
        and isinstance(module.get_base_layer(), LRQLinear)
    }


def try_out(layers: Mapping[str, Any], method: str, trial: Watch) -> None:
    """One pass of one row through the first of each kind and shape; weights on the meta device are passed over.

    Raises:
        SpecError: naming the first that fails, if the method has made something of the shape of codes.
    """
    tried = set()
    for name, layer in layers.items():
        base: LRQLinear = layer.get_base_layer()
        kind = (type(layer), base.in_features, base.out_features)
        if kind in tried or any(p.device.type == "meta" for p in layer.parameters()):
            continue
        tried.add(kind)
        error = error_of_a_pass(layer, base)
        # Without that, it misses what only a call to the whole model brings, and is no fault of the layer.
        if error is not None and trial.forms:
            raise SpecError(failure(method, name, error)) from error


@torch.no_grad()
def error_of_a_pass(layer: nn.Module, base: LRQLinear) -> Exception | None:
    """What one row of ones through a layer raises; in evaluation mode, which is given back."""
    modes = [(module, module.training) for module in layer.modules()]
    device = base.scales.device
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
            layer.eval()(torch.ones(1, base.in_features, device=device))
    except Exception as error:
        return error
    finally:
        for module, mode in modes:
            module.training = mode
    return None


def check_reads(trial: Watch, method: str, cause: Exception | None = None) -> None:
    """Refuse a method that has read weights.

    Raises:
        SpecError: naming the first layer, and what reads it.
    """
    if not trial.reads:
        return
    name, reader = next(iter(trial.reads.items()))
    raise SpecError(
        f"{method} needs the weight of {name}, which is compressed: it is codes (read in {reader}). {WHAT_WORKS}"
    ) from cause


def check_none_is_passed_over(model: nn.Module, config: Any) -> None:
    """Complain about a compressed layer that was to be adapted and was not.

    Raises:
        SpecError: naming the first.
    """
    if getattr(config, "target_modules", None) is None:
        return
    for name in layers_of(model):
        if isinstance(model.get_submodule(name), LRQLinear) and check_target_module_exists(config, name):
            raise SpecError(f"{type(config).__name__} passes over {name}, which is compressed. {WHAT_WORKS}")
