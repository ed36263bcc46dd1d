"""Which modules of a transformers model are left alone, and why, beyond what the size of a layer says."""

import dis
import functools
import inspect
from collections import Counter
from collections.abc import Sequence
from types import CodeType
from typing import Any

from torch import nn

from hf_lrq.patterns import first_match
from hf_lrq.work import sites_of

ROUTERS = ("gate", "router", "wg", "shared_expert_gate")

# Classes that look at a weight only behind an option that is off by default, or only to spare quantized dtypes.
HARMLESS_READS = {
    ("BloomAttention", "dense"),
    ("BloomMLP", "dense_4h_to_h"),
    ("NllbMoeDenseActDense", "fc2"),
    ("SeamlessM4TFeedForwardNetwork", "fc2"),
    ("SeamlessM4Tv2FeedForwardNetwork", "fc2"),
}


def skip_reasons(model: Any, patterns: Sequence[str] = ()) -> dict[str, str]:
    """Name of each candidate module to leave alone -> reason.

    Args:
        model: a PreTrainedModel; weights may be on the meta device.
        patterns: the user's own, see `hf_lrq.patterns`.
    """
    modules = dict(model.named_modules())
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    kept_in_fp32 = [*_listed(model, "_keep_in_fp32_modules"), *_listed(model, "_keep_in_fp32_modules_strict")]
    tied = _tied_modules(model)
    head = _output_embeddings(model)
    found = {}
    for name, module in modules.items():
        labels = [site.label for site in sites_of(name, module)]
        if not labels:
            continue
        parent, _, child = name.rpartition(".")
        if (pattern := first_match(patterns, name, *labels)) is not None:
            found[name] = f"matches {pattern!r} in modules_to_not_convert"
        elif module is head:
            found[name] = "output embeddings"
        elif name in tied:
            found[name] = "tied weights"
        elif places[id(module)] > 1:
            found[name] = "used in several places"
        elif first_match(ROUTERS, name) is not None:
            found[name] = "router"
        elif first_match(kept_in_fp32, name) is not None:
            found[name] = f"kept in float32 by {type(model).__name__}"
        elif reads_weight(type(modules[parent]), child):  # type: ignore[arg-type]
            found[name] = f"{type(modules[parent]).__name__} reads its weight directly"
        elif getattr(module, "has_post_expert_norm", False):
            found[name] = "fused experts with a norm after each expert are not supported"
    return found


def _listed(model: Any, attribute: str) -> list[str]:
    return list(getattr(model, attribute, None) or ())


def _tied_modules(model: Any) -> set[str]:
    keys = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return {key.rpartition(".")[0] for key in (*keys, *keys.values())}


def _output_embeddings(model: Any) -> nn.Module | None:
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # Composite models need not have the method.
        return None
    return head


@functools.cache
def reads_weight(owner: type, child: str) -> bool:
    """Whether code of class `owner` takes `self.<child>.weight` for anything but its device.

    Some models multiply with the weight themselves, or cast activations to its dtype, which would be that of the codes.
    Looks at the attribute chains in the byte code of the methods; what is reached on other ways is left to `trial`.
    """
    if (owner.__name__, child) in HARMLESS_READS:
        return False
    bases = [base for base in owner.__mro__ if base is not object and not base.__module__.startswith("torch.")]
    methods = (method for base in bases for name, method in vars(base).items() if name != "__init__")
    return any(_code_reads(code, child) for method in methods if (code := _code(method)) is not None)


def _code(method: Any) -> CodeType | None:
    if isinstance(method, staticmethod | classmethod):
        method = method.__func__
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    return code if isinstance(code, CodeType) else None


def _code_reads(code: CodeType, child: str) -> bool:
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
    for (_, first), (kind, second), (_, third) in zip(steps, steps[1:], steps[2:], strict=False):
        if first == child and second == "weight" and kind == "LOAD_ATTR" and third != "device":
            return True
    return any(_code_reads(inner, child) for inner in code.co_consts if isinstance(inner, CodeType))
