"""Which layers of a model an adapter is for: found by name, or compared with those it was trained on."""

import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from hf_lrq.errors import CheckpointError, SpecError, did_you_mean
from hf_lrq.integrations.peft import bitsandbytes
from hf_lrq.integrations.peft.config import LRQAdapterConfig
from hf_lrq.integrations.peft.merging import MergesIntoFactors
from hf_lrq.integrations.peft.offloading import check_none_is_offloaded
from hf_lrq.nn import LRQHead, LRQLinear

SHOWN = 3


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, adapters left out: for an adapted layer, the layer in it."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
            module = module.get_base_layer()
        found[name] = module
    return found


def layers_of(model: nn.Module) -> dict[str, LRQLinear]:
    """Name -> compressed linear layer, without its adapters."""
    return {name: module for name, module in modules_of(model).items() if isinstance(module, LRQLinear)}


def adaptable_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> linear layer that our adapters are for, without them: compressed, or of bitsandbytes."""
    linears = {name: module for name, module in modules_of(model).items() if isinstance(module, nn.Linear)}
    return {
        name: layer for name, layer in linears.items() if isinstance(layer, LRQLinear) or bitsandbytes.bits_of(layer)
    }


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Name of a layer that can be adapted -> its ranks, those of adapters that are merged into it not counted."""
    merged = {
        name: module.unmerged.rank
        for name, module in model.named_modules()
        if isinstance(module, MergesIntoFactors) and module.unmerged is not None
    }
    return {
        name: layer.factors().rank if isinstance(layer, LRQLinear) else min(layer.out_features, layer.in_features)
        for name, layer in adaptable_of(model).items()
    } | merged


def fingerprints(layers: Mapping[str, nn.Linear], ranks: Mapping[str, int]) -> dict[str, str]:
    """Name -> shape, ranks and a checksum of the first row of codes: equal for the same layer, in any dtype.

    Layers compressed from other weights, with other data or another seed have other codes.
    """
    return {
        name: f"{layer.out_features} x {layer.in_features} of rank {ranks[name]}, codes {_checksum(layer):08x}"
        if isinstance(layer, LRQLinear)
        else bitsandbytes.fingerprint(layer)
        for name, layer in layers.items()
    }


def _checksum(layer: LRQLinear) -> int:
    return zlib.crc32(layer.weight[0].detach().cpu().numpy().tobytes())


def chosen_layers(config: LRQAdapterConfig, model: nn.Module) -> dict[str, nn.Linear]:
    """The layers to adapt, as the config says.

    Raises:
        CheckpointError: if the config is that of an adapter for another base model.
        SpecError: if a target matches no compressed layer, the mode does not fit one that is matched, or that is
            offloaded.
    """
    layers = adaptable_of(model)
    ranks = ranks_of(model)
    if not layers:
        raise SpecError(
            f"{type(model).__name__} has no compressed linear layer, so there is no L R to adapt. Load a compressed "
            "checkpoint, or compress the model with LRQConfig first (one that bitsandbytes has loaded in 4 or 8 bits "
            "does as well); for other models, PEFT has LoRA."
        )
    if config.base_layers is not None:
        chosen = {name: layers[name] for name in config.base_layers if name in layers}
    elif config.target_modules is None or config.target_modules == "all-linear":
        # As PEFT does, output heads are left out unless they are named.
        inner = {name: layer for name, layer in layers.items() if not isinstance(layer, LRQHead)}
        chosen = _with_factors(config, _kept(config, inner, {name.rpartition(".")[2] for name in inner}), ranks)
    else:
        chosen = _matched(config, model, layers)
    check_none_is_offloaded(model, chosen, "added")
    if config.base_layers is not None:
        _check_same(config.base_layers, fingerprints(chosen, ranks))
    if not chosen:
        raise SpecError(f"No compressed layer is left to adapt.{_filters(config)}")
    for name, layer in chosen.items():
        reason = _misfit(config, name, layer, ranks[name])
        if reason is not None:
            raise SpecError(
                f"mode {config.mode!r} does not fit {name}: {reason}. Change the mode, set another number for this "
                "module in rank_pattern, or leave it out with exclude_modules."
            )
    return chosen


def _with_factors(
    config: LRQAdapterConfig, layers: dict[str, nn.Linear], ranks: Mapping[str, int]
) -> dict[str, nn.Linear]:
    """Those that nobody named and that a mode fits; where all are without factors, the caller says so of the first."""
    bare = [name for name, layer in layers.items() if not ranks[name] and _misfit(config, name, layer, 0)]
    if not 0 < len(bare) < len(layers):
        return layers
    warnings.warn(
        f"{len(bare)} compressed layers have no factors L and R (rank 0) and get no adapter: {_first(bare)}. Mode "
        "'append:r' gives them some.",
        UserWarning,
        stacklevel=2,
    )
    return {name: layer for name, layer in layers.items() if name not in bare}


def _misfit(config: LRQAdapterConfig, name: str, layer: nn.Linear, rank: int) -> str | None:
    if not isinstance(layer, LRQLinear):
        return bitsandbytes.misfit(config.mode_for(name), layer)
    return config.mode_for(name).misfit(layer.out_features, layer.in_features, rank)


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_same(stored: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compare the layers of a model with those an adapter was trained on.

    Raises:
        CheckpointError: at the first that is not there, or not the same.
    """
    for name, expected in stored.items():
        if here.get(name) != expected:
            found = f"here it is {here[name]}" if name in here else "here is no such compressed layer"
            raise CheckpointError(
                f"This adapter was trained on another base model: {name} was {expected}; {found}. Load the base model "
                "that adapter_config.json names. (To use its config for a new adapter, set base_layers to None.)"
            )


def _matched(config: LRQAdapterConfig, model: nn.Module, layers: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Layers that the targets of the config name.

    Raises:
        SpecError: on a target that names none.
    """
    targets = config.target_modules
    assert targets is not None, "the caller deals with None"
    modules = modules_of(model)
    passed_over = []
    for target in [targets] if isinstance(targets, str) else sorted(targets):
        names = [name for name in modules if name and _names(target, name, pattern=isinstance(targets, str))]
        if not any(name in layers for name in names):
            raise SpecError(_nothing_matched(target, names, modules, layers))
        passed_over += [name for name in names if name not in layers and isinstance(modules[name], nn.Linear)]
    if passed_over:
        warnings.warn(
            f"target_modules match linear layers that are not compressed and get no adapter: "
            f"{_first(passed_over)}. To train them, list them in modules_to_save.",
            UserWarning,
            stacklevel=2,
        )
    return _kept(config, layers, targets)


def _names(target: str, name: str, pattern: bool) -> bool:
    """Whether a target is for the module of this name, before any filter."""
    return bool(check_target_module_exists(_Selection(target if pattern else {target}), name))


def _nothing_matched(
    target: str, names: list[str], modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Linear]
) -> str:
    ends = {name.rpartition(".")[2] for name in layers}
    if names:
        kind = type(modules[names[0]]).__name__
        hint = "list it in modules_to_save to train it whole" if isinstance(modules[names[0]], nn.Linear) else ""
        hint = hint or f"compressed layers are called {', '.join(sorted(ends))}"
        return f"target_modules: {names[0]} is {kind}, not a compressed linear layer; {hint}."
    near = did_you_mean(target, ends) or did_you_mean(target, layers)
    return (
        f"target_modules: {target!r} matches no module.{near} Compressed layers are called {', '.join(sorted(ends))}."
    )


class _Selection:
    """The fields of a PEFT config that choose modules."""

    def __init__(self, targets: Any, config: LRQAdapterConfig | None = None):
        self.target_modules = targets
        self.target_parameters = None
        for name in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            setattr(self, name, getattr(config, name, None))


def _kept(config: LRQAdapterConfig, layers: Mapping[str, nn.Linear], targets: Any) -> dict[str, nn.Linear]:
    """Matched layers after all filters."""
    selection = _Selection(targets, config)
    return {name: layer for name, layer in layers.items() if check_target_module_exists(selection, name)}


def _filters(config: LRQAdapterConfig) -> str:
    names: Iterable[str] = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    given = [f"{name}={getattr(config, name)!r}" for name in names if getattr(config, name) is not None]
    return f" Filters: {', '.join(given)}." if given else ""
