"""Which modules of a transformers model are left alone, and why, beyond what the size of a layer says."""

import dis
import functools
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    kept_in_fp32 = kept_in_float32(model)
    tied = tied_modules(model)
    head = output_embeddings(model)
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
        elif _is_rescaled(model, child):
            found[name] = f"{type(model).__name__} rescales it whenever it is loaded (rescale_prenorm_residual)"
    return found


def _is_rescaled(model: Any, child: str) -> bool:
    """Whether loading ends with an initialisation that divides the weight of such children in place, loaded or not."""
    initialise = _code(getattr(type(model), "_init_weights", None))
    rescales = getattr(getattr(model, "config", None), "rescale_prenorm_residual", False)
    return bool(rescales) and initialise is not None and any(True for _ in _reads_of(initialise, child))


def _listed(model: Any, attribute: str) -> list[str]:
    return list(getattr(model, attribute, None) or ())


def kept_in_float32(model: Any) -> list[str]:
    """Patterns of the modules that a model wants in float32 whatever its dtype is."""
    return [*_listed(model, "_keep_in_fp32_modules"), *_listed(model, "_keep_in_fp32_modules_strict")]


def tied_modules(model: Any) -> set[str]:
    """Names of the modules that transformers ties to others, and of those others."""
    keys = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return {key.rpartition(".")[0] for key in (*keys, *keys.values())}


def output_embeddings(model: Any) -> nn.Module | None:
    """The output head, if there is one."""
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # Composite models need not have the method.
        return None
    return head


@functools.cache
def reads_weight(owner: type, child: str, to_initialise: bool = True) -> bool:
    """Whether code of class `owner` takes `self.<child>.weight` for anything but its device, and not in training alone.

    Some models multiply with the weight themselves, or cast activations to its dtype, which would be that of the codes.
    Looks at the attribute chains in the byte code of the methods; what is reached on other ways is left to `trial`.

    Args:
        owner: of the child.
        child: name of a module.
        to_initialise: whether initialising it counts, which is not done to a weight that is loaded.
    """
    if (owner.__name__, child) in HARMLESS_READS or only_in_training(owner, child):
        return False
    return any(True for code in _codes(owner, to_initialise) for _ in _reads_of(code, child))


@functools.cache
def only_in_training(owner: type, child: str) -> bool:
    """Whether `owner` reads the weight of a child, but only in branches of `if self.training`, its only use of that.

    Such a module can be kept on its other path, see `nn.inference_path`.
    """
    found = [read for code in _codes(owner) for read in _reads_of(code, child)]
    branches = [branch for code in _codes(owner) for branch in _training_branches(code)]
    own = [branch for branch in branches if any(branch.holds(read) for read in found)]
    return bool(found) and own == branches and all(any(branch.holds(read) for branch in own) for read in found)


@dataclass(frozen=True)
class _Place:
    """A part of byte code: offsets from `start` to before `end`."""

    code: CodeType
    start: int
    end: int

    def holds(self, other: "_Place") -> bool:
        return self.code is other.code and self.start < other.start and other.end <= self.end


def _codes(owner: type, to_initialise: bool = True) -> list[CodeType]:
    """The code of all methods of a class but its constructor, with the functions inside."""
    bases = [base for base in owner.__mro__ if base is not object and not base.__module__.startswith("torch.")]
    passed = ("__init__",) if to_initialise else ("__init__", "_init_weights")
    methods = (method for base in bases for name, method in vars(base).items() if name not in passed)
    found = [code for method in methods if (code := _code(method)) is not None]
    for code in found:  # It grows meanwhile.
        found += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return found


def _code(method: Any) -> CodeType | None:
    if isinstance(method, staticmethod | classmethod):
        method = method.__func__
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    return code if isinstance(code, CodeType) else None


def _reads_of(code: CodeType, child: str) -> Iterator[_Place]:
    steps = list(dis.get_instructions(code))
    for first, second, third in zip(steps, steps[1:], steps[2:], strict=False):
        weight = second.opname == "LOAD_ATTR" and second.argval == "weight"
        if first.argval == child and weight and third.argval != "device":
            yield _Place(code, first.offset, third.offset)


def _training_branches(code: CodeType) -> Iterator[_Place]:
    """What runs only if `self.training`; an empty place for another use of it."""
    steps = list(dis.get_instructions(code))
    jumps = [(step.offset, step.argval) for step in steps if "JUMP" in step.opname]
    for index, step in enumerate(steps):
        if step.opname != "LOAD_ATTR" or step.argval != "training":
            continue
        test = next((one for one in steps[index + 1 : index + 3] if "IF_FALSE" in one.opname), None)
        end = step.offset if test is None else test.argval
        # Nothing before gets into the branch on another way.
        entered = any(start < step.offset < target < end for start, target in jumps)
        yield _Place(code, step.offset, step.offset if entered else end)
