"""What a parameter group may hold, and how the pairs in it are found.

A group with `paired=True` lists its factors as L0, R0, L1, R1, ...; their position, and nothing else, says which belong
together. Wrappers replace the entries of `group["params"]` (accelerate does under FSDP2), so nobody keeps references.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_lrq.errors import did_you_mean
from hf_lrq.optim.input_metric import InputMetric

ParamGroup = dict[str, Any]

H_AWARE = "h_aware"
FORMER_NAMES = {"pre": "one_sided"}  # A saved state may call a preconditioner by its former name.
METRICS = "metrics"  # Key of a group: an InputMetric for each pair. Not in a state_dict: it is as large as a layer.


@dataclass(frozen=True)
class FactorPair:
    """The factors of a product s L R that is (a part of) a weight.

    Attributes:
        L: [..., out, r].
        R: [..., r, in].
        scaling: s; alpha / r in a LoRA adapter.
        name: what messages call the pair.
        metric: the metric of the inputs of R, for precond="h_aware".
    """

    L: Tensor
    R: Tensor
    scaling: float = 1.0
    name: str = "pair"
    metric: InputMetric | None = None


def pairs_of(group: ParamGroup) -> list[FactorPair]:
    """The pairs of a paired group, by position.

    Raises:
        ValueError: if the parameters do not pair up.
    """
    params = group["params"]
    if len(params) % 2:
        raise ValueError(
            f"A paired group has {len(params)} parameters, but pairs are listed as L0, R0, L1, R1, ... "
            "Put a parameter that is no factor into a group without `paired`. If a wrapper joins parameters "
            "(DeepSpeed), use precondition_gradients with any optimizer instead."
        )
    pairs = []
    metrics = group.get(METRICS) or [None] * (len(params) // 2)
    for i in range(0, len(params), 2):
        name = pair_name(group, i // 2)
        pairs.append(FactorPair(params[i], params[i + 1], group["scaling"], name, metrics[i // 2]))
        check_pair(pairs[-1])
    return pairs


def check_pair(pair: FactorPair) -> None:
    """Complain about factors that cannot be multiplied.

    Raises:
        ValueError: naming the pair and its shapes.
    """
    L, R = pair.L, pair.R
    if not (L.is_floating_point() and R.is_floating_point()):
        raise ValueError(
            f"{pair.name} has factors of {L.dtype} and {R.dtype}; only floating-point factors can be trained."
        )
    seen = f"{pair.name} has L of shape {list(L.shape)} and R of shape {list(R.shape)}"
    if L.ndim < 2 or R.ndim < 2:
        raise ValueError(
            f"{seen}; a factor has at least two dimensions. If a wrapper flattens parameters (DeepSpeed, FSDP1), "
            "use precondition_gradients with any optimizer instead."
        )
    if L.shape[:-2] != R.shape[:-2] or L.shape[-1] != R.shape[-2]:
        raise ValueError(
            f"{seen}; the product needs L [..., out, r] and R [..., r, in]. Pairs are listed as L0, R0, L1, R1, ... "
            "In PEFT's names L is lora_B and R is lora_A."
        )
    if L.shape[-1] > max(L.shape[-2], R.shape[-1]):
        raise ValueError(
            f"{seen}, so the rank {L.shape[-1]} is larger than both sides of the product. "
            "If the two are swapped, list L [..., out, r] first; otherwise lower the rank."
        )
    if L.device != R.device:
        raise ValueError(f"{pair.name} has L on {L.device} and R on {R.device}; move both to one device.")


def pair_name(group: ParamGroup, index: int) -> str:
    """'Pair 3', with the name of its layer where the group has one."""
    if names := group.get("names"):
        return f"Pair {index} ({names[index]})"
    if names := group.get("param_names"):
        return f"Pair {index} ({names[2 * index]}, {names[2 * index + 1]})"
    return f"Pair {index}"


def parameter_name(group: ParamGroup, index: int) -> str:
    """How messages call one entry of group["params"]."""
    if group["paired"]:
        return f"{'LR'[index % 2]} of {pair_name(group, index // 2).replace('Pair', 'pair')}"
    names = group.get("names") or group.get("param_names")
    return f"parameter {index} ({names[index]})" if names else f"parameter {index}"


# What each number in a group must satisfy, in words and as a function.
RULES = {
    "lr": ("a number, at least 0", lambda x: float(x) >= 0),
    "lr_ratio": ("positive", lambda x: 0 < x < math.inf),
    "weight_decay": ("at least 0", lambda x: x >= 0),
    "damping": ("positive: a fraction of the mean eigenvalue of a Gram, 1e-6 for example", lambda x: 0 < x < math.inf),
    "refresh": ("an integer, at least 1", lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1),
    "scaling": ("a finite number other than 0", lambda x: x != 0 and math.isfinite(x)),
    "betas": ("two numbers in [0, 1)", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x)),
    "eps": ("at least 0", lambda x: x >= 0),
    "momentum": ("in [0, 1)", lambda x: 0 <= x < 1),
    "trust": ("positive, or None", lambda x: x is None or x > 0),
    "clip_projected": ("positive, or None", lambda x: x is None or x > 0),
    "state_bits": ("8 or 32", lambda x: x in (8, 32)),
}


def use_present_names(group: ParamGroup) -> None:
    """Replace the former name of a preconditioner, in place."""
    group["precond"] = FORMER_NAMES.get(group["precond"], group["precond"])


def check_group(group: ParamGroup, preconditioners: tuple[str, ...]) -> None:
    """Complain about a group before the first step does.

    Args:
        group: a group with all its options.
        preconditioners: the values that `precond` may have.

    Raises:
        ValueError: naming what is wrong.
    """
    for option, (allowed, holds) in RULES.items():
        if option in group and not holds(group[option]):
            raise ValueError(f"{option} is {group[option]}; it must be {allowed}.")
    if group["precond"] not in preconditioners:
        hint = did_you_mean(str(group["precond"]), preconditioners)
        raise ValueError(f"Unknown precond {group['precond']!r}. Known: {', '.join(preconditioners)}.{hint}")
    if group.get("nesterov") and group["momentum"] == 0:
        raise ValueError("nesterov=True needs a momentum; 0.9 is usual.")
    entries = len(group["params"]) // 2 if group["paired"] else len(group["params"])
    if (names := group.get("names")) is not None and len(names) != entries:
        kind = "pairs" if group["paired"] else "parameters"
        raise ValueError(f"A group has {len(names)} names for {entries} {kind}; give one for each, or none.")
    if group["paired"]:
        check_metrics(group)
        pairs_of(group)


def check_metrics(group: ParamGroup) -> None:
    """Complain about Grams that are missing, or that nothing would use.

    Raises:
        ValueError: naming the pair.
    """
    metrics = group.get(METRICS)
    if group["precond"] != H_AWARE:
        if metrics is not None:
            raise ValueError(f"Grams are given, but precond={group['precond']!r} has no use for them; set {H_AWARE!r}.")
        return
    pairs = len(group["params"]) // 2
    if metrics is None or len(metrics) != pairs:
        seen = "none" if metrics is None else len(metrics)
        raise ValueError(
            f"precond={H_AWARE!r} needs the Gram of the inputs of each of {pairs} pairs, got {seen}. "
            "Pass `grams` to riemannian_param_groups."
        )
    for i, metric in enumerate(metrics):
        if metric is None:
            raise ValueError(f"{pair_name(group, i)} has no Gram; give its FactorPair a `metric`.")
        width = group["params"][2 * i + 1].shape[-1]
        if metric.H.shape[-1] != width:
            raise ValueError(
                f"{pair_name(group, i)} has an R of width {width}, but a Gram of width {metric.H.shape[-1]}."
            )


def check_same_pairing(groups: list[ParamGroup], saved: list[Mapping[str, Any]]) -> None:
    """Complain about a saved state whose groups are paired in another way.

    Raises:
        ValueError: naming the group.
    """
    for number, (group, other) in enumerate(zip(groups, saved, strict=False)):
        if other.get("paired") != group["paired"]:
            raise ValueError(
                f"Group {number} has paired={group['paired']}, in the saved state it has paired={other.get('paired')}. "
                "The state belongs to another optimizer or to other groups; build the groups as they were when saving."
            )
        needed, given = other.get("precond") == H_AWARE, group.get(METRICS) is not None
        if group["paired"] and needed != given:
            raise ValueError(
                f"Group {number} has {'Grams' if given else 'no Grams'}, in the saved state it has precond="
                f"{other.get('precond')!r}. Grams are not saved: pass the same `grams` as then, or none."
            )
