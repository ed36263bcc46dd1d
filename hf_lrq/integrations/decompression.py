"""From compressed layers, embeddings and heads back to ordinary ones."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn

from hf_lrq.errors import SpecError
from hf_lrq.nn import COMPRESSED, LRQEmbedding, LRQLinear, unfuse_layers
from hf_lrq.nn.fused_experts import owns_stacks
from hf_lrq.nn.inference_path import let_go
from hf_lrq.work import Site
from hf_lrq.work.sites import LinearSite

_Module = TypeVar("_Module", bound=nn.Module)


def decompress(model: Any, sites: Iterable[Site], dtype: torch.dtype) -> Any:
    """Replace every compressed layer of a model by the ordinary one that it stands for.

    Args:
        model: changed in place.
        sites: of the compressed matrices.
        dtype: of the weights.

    Raises:
        SpecError: if a weight is offloaded; the model is then unchanged.
    """
    unfuse_layers(model)
    # All of them before the first is replaced: a model of both kinds must not come about.
    for name, module in model.named_modules():
        _check_is_at_hand(name, module)
    owned: dict[str, list[Site]] = {}
    for site in sites:
        owned.setdefault(site.name, []).append(site)
    followers = {name for each in owned.values() for site in each for name in site.modules}
    for name, module in list(model.named_modules()):
        let_go(module)
        if isinstance(module, LRQLinear) and name not in owned and name not in followers:  # Inside an adapter.
            owned[name] = [LinearSite(name, module.out_features, module.in_features)]
        compressed = isinstance(module, LRQLinear | LRQEmbedding) or owns_stacks(module)
        for site in owned.get(name, ()) if compressed else ():
            _restore(model, site, name, module, dtype)
    return model


def decompress_tables(model: Any, tables: Iterable[Site], dtype: torch.dtype) -> None:
    """Replace the compressed embeddings and heads of a model by ordinary ones; its layers stay as they are.

    Args:
        model: changed in place.
        tables: their sites.
        dtype: of the weights.

    Raises:
        SpecError: if one of them is offloaded; the model is then unchanged.
    """
    modules = {site: model.get_submodule(site.name) for site in tables}
    for site, module in modules.items():
        _check_is_at_hand(site.name, module)
    for site, module in modules.items():
        _restore(model, site, site.name, module, dtype)


def _check_is_at_hand(name: str, module: nn.Module) -> None:
    if isinstance(module, COMPRESSED) and module.weight.device.type == "meta":
        raise SpecError(f"{name} is offloaded, so its weight is not at hand. Load the model without offloading.")


def _restore(model: Any, site: Site, name: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Replace one module, and those that share its weight."""
    plain = site.uncompressed(module, dtype)
    if plain is not module:
        model.set_submodule(name, with_hook_of(module, plain))
    for old, new in site.unfollow(model):
        with_hook_of(old, new)


def with_hook_of(old: nn.Module, new: _Module) -> _Module:
    """The new module with the hook by which accelerate moves the inputs of the old one, if any."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
    return new
