"""Parameter groups of a model: factors in pairs, found by how modules hold them, and everything else as usual."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.errors import did_you_mean
from hf_lrq.optim.input_metric import GRAM_DAMPING, InputMetric, check_shape
from hf_lrq.optim.pairs import METRICS, FactorPair, ParamGroup, check_pair

# The attributes in which modules hold the two factors of a product: first L [.., out, r], then R [.., r, in]. Each is a
# parameter, a module with a `weight`, or (PEFT) a dictionary from adapter names to one of these.
FACTOR_ATTRIBUTES = (
    ("lr_L", "lr_R"),
    ("lrq_L", "lrq_R"),
    ("lora_B", "lora_A"),
    ("lora_embedding_B", "lora_embedding_A"),
)

PEFT_PREFIX = "base_model.model."  # What PEFT puts before the names of the modules of a model.

# Parameters that transformers' Trainer does not decay either.
NO_DECAY_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
NO_DECAY_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def factor_pairs(model: nn.Module, attributes: Iterable[tuple[str, str]] = FACTOR_ATTRIBUTES) -> list[FactorPair]:
    """Every pair of floating-point factors in `model` of which at least one requires a gradient.

    Found are compressed layers and expert stacks with 16-bit factors, adapters that train such factors, and PEFT's LoRA
    on linear and embedding layers, with its scaling as it is now. Factors that several modules share are found once.

    Left out are convolutions and adapters that keep the factors of many experts in one matrix, because L R is not one
    matrix product there; and ranks above both sides of their matrix, whose Grams are singular by construction.

    Args:
        model: any module.
        attributes: names under which modules hold L and R.
    """
    return [pair for _, _, _, pair in held_pairs(model, attributes)]


def held_pairs(
    model: nn.Module, attributes: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, nn.Module, str, FactorPair]]:
    """Name of a module, the module, adapter ("" for none), and pair, for what `factor_pairs` finds."""
    found: set[tuple[int, int]] = set()
    attributes = tuple(attributes)
    for path, module in model.named_modules():
        for left, right in attributes:
            for adapter, L, R in factors_of(module, left, right):
                trained = is_matrix_product(module, adapter, L, R) and (L.requires_grad or R.requires_grad)
                if trained and (id(L), id(R)) not in found:
                    found.add((id(L), id(R)))
                    scaling = float(by_adapter(module, "scaling", adapter, 1.0))
                    name = ".".join(part for part in (path, left, adapter) if part)
                    yield path, module, adapter, FactorPair(L, R, scaling, name)


def with_metrics(
    model: nn.Module, attributes: Iterable[tuple[str, str]], grams: Mapping[str, Any], damping: float
) -> list[FactorPair]:
    """What `factor_pairs` finds, each pair with the metric of its inputs; see `riemannian_param_groups`.

    Raises:
        ValueError: if a pair has no Gram, or one that does not fit.
    """
    pairs = []
    for path, module, adapter, pair in held_pairs(model, attributes):
        layer = path if path in grams else path.removeprefix(PEFT_PREFIX)
        if layer not in grams:
            known = ", ".join(list(grams)[:3]) or "none"
            raise ValueError(
                f"{pair.name} has no Gram: `grams` has no {layer!r}.{did_you_mean(layer, grams)} It has {len(grams)} "
                f"entries: {known}, ... Names are those of the modules that hold factors."
            )
        if pair.R.ndim > 2:
            raise ValueError(f'{pair.name} is a stack of products; "h_aware" is for single ones.')
        width, given = pair.R.shape[-1], grams[layer]
        gram = (given if isinstance(given, Tensor) else given.H).to(pair.R.device)
        check_shape(gram, width, pair.name)
        # Factors that stand between rotations meet rotated inputs; modules that hold such ones say which.
        rotate = getattr(module, "factor_gram", None)
        if rotate is not None:
            gram = rotate(torch.diag(gram) if gram.ndim == 1 else gram, adapter)
        pairs.append(replace(pair, metric=InputMetric.of(gram, width, damping, pair.name)))
    return pairs


def factors_of(module: nn.Module, left: str, right: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(adapter, L, R) for each pair under two attributes of one module; the adapter is "" where there are none."""
    lefts, rights = (entries(getattr(module, attribute, None)) for attribute in (left, right))
    for adapter, L in lefts.items():
        if adapter in rights:
            yield adapter, L, rights[adapter]


def entries(held: Any) -> dict[str, Tensor]:
    """The tensors under one attribute, by adapter name."""
    if isinstance(held, nn.ModuleDict | nn.ParameterDict | Mapping):
        return {name: tensor for name, value in held.items() for tensor in entries(value).values()}
    tensor = getattr(held, "weight", None) if isinstance(held, nn.Module) else held
    return {"": tensor} if isinstance(tensor, Tensor) else {}


def by_adapter(module: nn.Module, attribute: str, adapter: str, default: Any) -> Any:
    """module.attribute[adapter] where there is such a dictionary and adapter."""
    held = getattr(module, attribute, None)
    return held.get(adapter, default) if isinstance(held, Mapping) else default


def is_matrix_product(module: nn.Module, adapter: str, L: Tensor, R: Tensor) -> bool:
    """Whether the module multiplies L by R, as matrices or stacks of them, and the rank is a rank."""
    return (
        L.is_floating_point()
        and R.is_floating_point()
        and 2 <= L.ndim == R.ndim <= 3
        and L.shape[:-2] == R.shape[:-2]
        and L.shape[-1] == R.shape[-2] == by_adapter(module, "r", adapter, R.shape[-2])
        and L.shape[-1] <= max(L.shape[-2], R.shape[-1])
    )


def riemannian_param_groups(
    model: nn.Module,
    lr: float | None = None,
    weight_decay: float = 0.0,
    factor_weight_decay: float = 0.0,
    lr_ratio: float | None = None,
    pairs: Iterable[FactorPair | tuple[Tensor, Tensor]] = (),
    attributes: Iterable[tuple[str, str]] = FACTOR_ATTRIBUTES,
    grams: Mapping[str, Any] | None = None,
    gram_damping: float = GRAM_DAMPING,
) -> list[ParamGroup]:
    """Groups for `RiemannianAdamW` and `RiemannianSGD`: pairs of factors, a group for each scaling, then the rest.

    Factors are not decayed by default. Decay on both shrinks their product, and in a compressed layer that product is
    part of the pretrained weight: it would be forgotten. For adapters that started at zero, where decay pulls back to
    the pretrained weight, pass `factor_weight_decay`. The rest follows transformers: no decay for biases and norms.

    Args:
        model: see `factor_pairs`.
        lr: learning rate of all groups; None for the optimizer's.
        weight_decay: weight decay of plain parameters that are neither biases nor norms.
        factor_weight_decay: weight decay of factors.
        lr_ratio: learning rate of L over that of R; None for the optimizer's.
        pairs: further pairs, which the structure of the model does not show; a tuple is (L, R).
        attributes: names under which modules hold L and R.
        grams: for precond="h_aware" (experimental), name of a module -> Gram of its inputs: an `InputGram`, a tensor
            [in, in], or the diagonal [in]. `calibration.input_grams` measures them. Names may be those that the modules
            had before PEFT wrapped the model. Equal in every process; not part of checkpoints of the optimizer.
        gram_damping: fraction of the mean eigenvalue that each Gram is shrunk towards.

    Returns:
        Groups in the order of the model's modules, the same in every process. A frozen factor is listed beside its
        trained partner, whose preconditioner needs it.

    Raises:
        ValueError: if there is no pair at all, one factor would be in two pairs, or a Gram is missing or does not fit.
    """
    attributes = tuple(attributes)
    found = factor_pairs(model, attributes) if grams is None else with_metrics(model, attributes, grams, gram_damping)
    for i, pair in enumerate(pairs):
        found.append(pair if isinstance(pair, FactorPair) else FactorPair(*pair, name=f"pairs[{i}]"))
    if not found:
        wanted = ", ".join(f"{left} and {right}" for left, right in attributes)
        raise ValueError(
            f"{type(model).__name__} has no trainable floating-point factors under {wanted}. "
            "Unfreeze them (refit_factors makes floats of factors in 8 or 4 bits), add an adapter, or pass `pairs`; "
            "without factors use torch.optim.AdamW. If a wrapper has flattened them (FSDP1, DeepSpeed), use FSDP2 or "
            "precondition_gradients."
        )
    owners = owners_of(found)

    common: ParamGroup = {} if lr is None else {"lr": lr}
    ratio: ParamGroup = {} if lr_ratio is None else {"lr_ratio": lr_ratio}
    paired: dict[float, ParamGroup] = {}
    for pair in found:
        options = {"scaling": pair.scaling, "weight_decay": factor_weight_decay, **common, **ratio}
        group = paired.setdefault(pair.scaling, {"params": [], "names": [], "paired": True, **options})
        group["params"] += [pair.L, pair.R]
        group["names"].append(pair.name)
        if grams is not None:
            group.setdefault(METRICS, []).append(pair.metric)

    decayed: ParamGroup = {"params": [], "names": [], "paired": False, "weight_decay": weight_decay, **common}
    spared: ParamGroup = {"params": [], "names": [], "paired": False, "weight_decay": 0.0, **common}
    kept = decayed_names(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owners:
            group = decayed if name in kept else spared
            group["params"].append(parameter)
            group["names"].append(name)
    return [*paired.values(), *(group for group in (decayed, spared) if group["params"])]


def owners_of(pairs: list[FactorPair]) -> dict[int, str]:
    """The name of the pair that each factor (by identity) belongs to.

    Raises:
        ValueError: if a factor belongs to two, or does not fit its partner.
    """
    owners: dict[int, str] = {}
    for pair in pairs:
        check_pair(pair)
        for side, factor in (("L", pair.L), ("R", pair.R)):
            if id(factor) in owners:
                raise ValueError(
                    f"{side} of {pair.name} also belongs to {owners[id(factor)]}; a factor can be preconditioned for "
                    "one product only. Leave one of the pairs out, or use precondition_in_graph."
                )
        owners[id(pair.L)] = owners[id(pair.R)] = pair.name
    return owners


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to."""
    names = set()
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if not isinstance(module, NO_DECAY_MODULES) and not NO_DECAY_NAME.search(full.lower()):
                names.add(full)
    return names
