"""Which matrices of a model are compressed, and why the others are not."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from hf_lrq.errors import CompressionError
from hf_lrq.kernels import has_backend, status
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.patterns import check_names, check_patterns, first_match
from hf_lrq.spec import CompressionSpec, LayerSpec

logger = logging.getLogger(__name__)

EXPERT_MATRICES = ("gate_up_proj", "down_proj")
LISTED = 3  # Names spelled out for each reason.
# Flags of fused expert layers whose storage or arithmetic differs from plain [E, out, in] gated experts without bias.
_UNSUPPORTED_EXPERTS = {"has_bias": True, "is_transposed": True, "is_concatenated": False, "has_gate": False}


@dataclass(frozen=True)
class Target:
    """One matrix, or one stack of equal matrices, to compress.

    Attributes:
        name: of the module; for expert stacks that of the module that owns the stack.
        kind: "linear", "conv1d" (weight stored [in, out]) or "experts".
        out_features, in_features: of each matrix.
        experts: number of matrices, 1 unless kind is "experts".
        matrix: "weight", or which of the expert stacks.
        spec: what to do.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    spec: LayerSpec
    experts: int = 1
    matrix: str = "weight"

    @property
    def parameters(self) -> int:
        """Weights replaced."""
        return self.experts * self.out_features * self.in_features

    @property
    def bytes(self) -> int:
        """Bytes of everything stored instead."""
        return self.experts * self.spec.layout.bytes(self.out_features, self.in_features)

    @property
    def full_name(self) -> str:
        """Module name, and for expert stacks the matrix: unique in the model."""
        return self.name if self.kind != "experts" else f"{self.name}.{self.matrix}"


@dataclass
class TargetList:
    """What `find_targets` found.

    Attributes:
        compressed: targets in the order of the model's modules.
        skipped: module name -> reason.
        total_parameters: of the whole model.
        skipped_parameters: module name -> weights left as they are.
    """

    compressed: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    skipped_parameters: dict[str, int] = field(default_factory=dict)
    total_parameters: int = 0

    @property
    def compressed_parameters(self) -> int:
        """Weights that are replaced."""
        return sum(target.parameters for target in self.compressed)

    @property
    def share(self) -> float:
        """Fraction of the model's parameters that is compressed."""
        return self.compressed_parameters / max(self.total_parameters, 1)

    def summary(self) -> str:
        """One line: how many matrices and what share of the parameters."""
        return (
            f"{len(self.compressed)} matrices with {self.compressed_parameters:,} of {self.total_parameters:,} "
            f"parameters ({self.share:.1%}) compressed; {len(self.skipped)} modules left as they are"
        )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's transposed linear, recognised without importing its library."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def has_fused_experts(module: nn.Module) -> bool:
    """Whether the module owns stacks of expert matrices [E, out, in] as parameters."""
    stacks = [module._parameters.get(matrix) for matrix in EXPERT_MATRICES]
    return all(stack is not None and stack.ndim == 3 for stack in stacks)


def find_targets(
    model: nn.Module,
    spec: CompressionSpec,
    skip: Sequence[str] = (),
    reasons: dict[str, str] | None = None,
    bytes_per_weight: int = 2,
) -> TargetList:
    """Every linear layer, transposed linear and fused expert stack worth compressing.

    Args:
        model: weights may be on the meta device.
        spec: what to do to each.
        skip: names or patterns of modules to leave alone, see `hf_lrq.patterns`.
        reasons: pattern -> why; patterns without an entry read "excluded by the configuration".
        bytes_per_weight: of the uncompressed model; a layer that would not shrink is left alone.

    Raises:
        SpecError: if a pattern or a name matches nothing.
        CompressionError: if nothing is left to compress.
    """
    reasons = reasons or {}
    _check_names(model, spec, skip)
    found = TargetList(total_parameters=count_parameters(model))
    # While a model is loaded its weights are nowhere yet; they go to a GPU if there is one.
    future = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), future)
    fast = has_backend(device)
    passed_over: set[str] = set()
    candidates = 0
    for name, module in model.named_modules():
        for target in _candidates(name, module, spec):
            candidates += 1
            fitted = target.spec.fitted(target.out_features, target.in_features, blocks=fast)
            best = target.spec.fitted(target.out_features, target.in_features)
            target = replace(target, spec=fitted)
            reason = None
            if (pattern := first_match(skip, *names_of(name, module))) is not None:
                reason = reasons.get(pattern, "excluded by the configuration")
            elif target.bytes >= bytes_per_weight * target.parameters:
                reason = "would not get smaller with this rank and these bits"
            elif target.kind == "experts" and (flag := _unsupported_flag(module)):
                reason = f"fused experts with {flag} are not supported"
            if reason is None:
                found.compressed.append(target)
                if fitted != best:
                    passed_over.add(f"{best.resolved_codebook} (now {fitted.resolved_codebook})")
            else:
                found.skipped[target.full_name] = reason
                found.skipped_parameters[target.full_name] = target.parameters
    if passed_over:
        logger.warning(
            "codebook 'auto' is not %s, because nothing here searches its paths fast: %s",
            ", ".join(sorted(passed_over)),
            status(device),
        )
    if not found.compressed:
        seen = f"{candidates} linear layers found, all skipped ({_by_reason(found.skipped)})"
        raise CompressionError(
            f"{type(model).__name__} has no layer to compress: "
            + (f"{seen}. Lower the rank, or shorten modules_to_not_convert." if candidates else "none is linear.")
        )
    return found


def names_of(name: str, module: nn.Module) -> list[str]:
    """The names that a pattern can match: that of the module, and of each stack of experts in it."""
    return [name, *(f"{name}.{matrix}" for matrix in EXPERT_MATRICES if has_fused_experts(module))]


def all_names(model: nn.Module) -> list[str]:
    """The names that a pattern can match in the whole model."""
    return [each for name, module in model.named_modules() for each in names_of(name, module)]


def _check_names(model: nn.Module, spec: CompressionSpec, skip: Sequence[str]) -> None:
    names = all_names(model)
    check_patterns("patterns", spec.patterns, names)
    check_patterns("skip", skip, names)
    targets = [each for name, module in model.named_modules() for each in _candidates(name, module, spec)]
    check_names("layers", spec.layers, [target.full_name for target in targets])


def count_parameters(model: nn.Module) -> int:
    """Weights of a model; tied ones once, also while they are not tied yet because the model is being loaded."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    seen: set[int | str] = set()
    count = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same = {id(parameter), tied.get(name, name)}
        if seen.isdisjoint(same):
            count += parameter.numel()
        seen |= same
    return count


def _by_reason(skipped: Mapping[str, str]) -> str:
    """Names and reasons in one line, a reason once."""
    parts = []
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        parts.append(f"{', '.join(names[:LISTED])}{more}: {reason}")
    return "; ".join(parts)


def _candidates(name: str, module: nn.Module, spec: CompressionSpec) -> list[Target]:
    if isinstance(module, LRQLinear | LRQExpertStack):
        return []
    # Not isinstance: subclasses of nn.Linear often have a forward of their own.
    if type(module) is nn.Linear:
        return [Target(name, "linear", module.out_features, module.in_features, spec.for_layer(name))]
    if is_conv1d(module):
        rows, columns = module.get_parameter("weight").shape
        return [Target(name, "conv1d", int(columns), int(rows), spec.for_layer(name))]
    if has_fused_experts(module):
        found = []
        for matrix in EXPERT_MATRICES:
            experts, rows, columns = module._parameters[matrix].shape  # type: ignore[union-attr]
            chosen = spec.for_layer(f"{name}.{matrix}")
            found.append(Target(name, "experts", rows, columns, chosen, experts, matrix))
        return found
    return []


def _unsupported_flag(module: nn.Module) -> str | None:
    for flag, unsupported in _UNSUPPORTED_EXPERTS.items():
        if getattr(module, flag, not unsupported) == unsupported:
            return f"{flag}={unsupported}"
    return None if hasattr(module, "_apply_gate") else "no _apply_gate"
