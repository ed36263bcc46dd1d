"""The tables of a transformers model: its embeddings of tokens and its output head, and what is tied to them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_lrq.integrations.skip_rules import kept_in_float32, output_embeddings, reads_weight, tied_modules
from hf_lrq.patterns import first_match
from hf_lrq.work import EmbeddingSite, HeadSite, Site
from hf_lrq.work.plainness import is_plain_linear, lookup_of
from hf_lrq.work.sites import joined

NOT_TOKENS = "not a table of input tokens"


def tables_of(model: Any, patterns: Sequence[str] = ()) -> tuple[list[Site], dict[str, str]]:
    """Sites of the embeddings of tokens and of the output head, and name of each other embedding or head -> reason.

    Args:
        model: a PreTrainedModel; weights may be on the meta device, where none are tied yet.
        patterns: of modules to leave alone, see `hf_lrq.patterns`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    of_tokens = {id(table) for table in input_embeddings(model)}
    groups = _groups(model, modules)
    sites: list[Site] = []
    left: dict[str, str] = {}
    for name, members in groups.items():
        if not any(id(modules[member]) in of_tokens for member in (name, *members)):
            left[name] = NOT_TOKENS
        elif (reason := _reason(model, modules, (name, *members), patterns)) is not None:
            left |= dict.fromkeys((name, *members), reason)
        else:
            site = EmbeddingSite.tied(name, modules[name], {member: modules[member] for member in members})
            assert site is not None, "`_reason` has nothing against it"
            sites.append(site)
    head = _own_head(model, modules, groups)
    if head is not None and (reason := _reason(model, modules, (head,), patterns)) is not None:
        left[head] = reason
    elif head is not None:
        sites += HeadSite.of(head, modules[head])
    return sites, left


def input_embeddings(model: nn.Module) -> Iterable[nn.Module]:
    """What the models inside a model, and it itself, look tokens up in."""
    for module in model.modules():
        try:
            table = module.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):  # Most modules have no such method; composite models need not.
            continue
        if isinstance(table, nn.Embedding):
            yield table


def tie_scales(model: Any, sites: Iterable[Site]) -> None:
    """Let transformers tie the scales of tables wherever it ties their codes, as it loads and saves them."""
    extra = {
        joined(alias.removesuffix(".weight"), "scales"): joined(site.holder, "scales")
        for site in sites
        for alias in site.aliases
    }
    if extra:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **extra}
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **extra}


def untie_scales(model: Any) -> None:
    """Undo `tie_scales`."""
    model.__dict__.pop("_tied_weights_keys", None)
    tied = model.all_tied_weights_keys.items()
    model.all_tied_weights_keys = {target: source for target, source in tied if not target.endswith(".scales")}


def _groups(model: Any, modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Name of each embedding that others are not tied to -> names of the modules that are tied to it."""
    sources = {
        target.rpartition(".")[0]: source.rpartition(".")[0]
        for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items()
        if target.endswith("weight") and source.endswith("weight")
    }
    holders: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        holder = sources.get(name) or holders.get(id(weight))
        if holder is None:
            holders[id(weight)] = name
            if isinstance(module, nn.Embedding):
                groups.setdefault(name, [])
        elif holder in modules and isinstance(modules[holder], nn.Embedding):
            groups.setdefault(holder, []).append(name)
    return {name: tuple(members) for name, members in groups.items()}


def _own_head(model: Any, modules: Mapping[str, nn.Module], groups: Mapping[str, Sequence[str]]) -> str | None:
    """Name of a linear output head with a weight of its own."""
    head = output_embeddings(model)
    name = next((name for name, module in modules.items() if module is head), None)
    weights = Counter(id(module._parameters.get("weight")) for module in modules.values())
    if head is None or name is None or not is_plain_linear(head) or name in tied_modules(model):
        return None
    tied = any(name in members for members in groups.values()) or weights[id(head.weight)] > 1
    return None if tied else name


def _reason(
    model: Any, modules: Mapping[str, nn.Module], members: Sequence[str], patterns: Sequence[str]
) -> str | None:
    """Why a table, which these modules share, is left alone; None if it is not."""
    shape = modules[members[0]].get_parameter("weight").shape
    for name in members:
        module = modules[name]
        parent, _, child = name.rpartition(".")
        if (pattern := first_match(patterns, name)) is not None:
            return f"matches {pattern!r} in modules_to_not_convert"
        if lookup_of(module) is None and not is_plain_linear(module):
            return f"{type(module).__name__} {name} does more than look rows up or multiply with them"
        if module.get_parameter("weight").shape != shape:
            return f"{name} has another shape"
        if first_match(kept_in_float32(model), name) is not None:
            return f"kept in float32 by {type(model).__name__}"
        if reads_weight(type(modules[parent]), child, to_initialise=False):  # type: ignore[arg-type]
            return f"{type(modules[parent]).__name__} reads its weight directly"
    return None
