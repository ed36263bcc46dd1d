"""Between a transformers model and its compressed modules: what replaces what, under which names."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lrq.calibration.records import LayerRecord
from hf_lrq.calibration.targets import EXPERT_MATRICES, Target, TargetList, has_fused_experts, is_conv1d
from hf_lrq.checkpoint import Headers, QuantizationHeader, float_dtype
from hf_lrq.codebooks import get_codebook
from hf_lrq.decomposition import CompressedMatrix, compress_matrix, generator_for, input_rotation
from hf_lrq.errors import CompressionError, SpecError
from hf_lrq.integrations.experts import PREFIX, add_stacks, use_stacks
from hf_lrq.integrations.skip_rules import is_candidate
from hf_lrq.layout import LayerLayout, TensorLayout
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.spec import LayerSpec


def compress_weight(weight: Tensor, target: Target, seed: int) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    """Compress one weight, or one stack of them, without data.

    Args:
        weight: [out, in]; [in, out] of a Conv1D; [E, out, in] of experts.

    Returns:
        What is stored, by name, and one record per matrix.

    Raises:
        CompressionError: naming the matrix.
    """
    if target.kind != "experts":
        matrix, record = _compress_named(weight.T if target.kind == "conv1d" else weight, target.name, target, seed)
        return matrix.tensors(), [record]
    stacked: dict[str, list[Tensor]] = {}
    records = []
    for index, expert in enumerate(weight):
        matrix, record = _compress_named(expert, f"{target.full_name}.{index}", target, seed)
        records.append(record)
        for name, tensor in matrix.tensors().items():
            stacked.setdefault(name, []).append(tensor)
    return {name: torch.stack(tensors) for name, tensors in stacked.items()}, records


def _compress_named(W: Tensor, name: str, target: Target, seed: int) -> tuple[CompressedMatrix, LayerRecord]:
    started = time.monotonic()
    rotation = input_rotation(seed, name, target.in_features, target.spec)
    try:
        matrix = compress_matrix(W.detach(), None, target.spec, generator_for(seed, name), rotation)
    except CompressionError as error:
        raise CompressionError(f"{name}: {error}") from None
    return matrix, LayerRecord.of(name, target, matrix, time.monotonic() - started)


def install(model: Any, targets: Iterable[Target], keep_weights: bool) -> None:
    """Put empty compressed modules in the place of the targets, on the device of their weights.

    Args:
        keep_weights: leave the uncompressed parameter in each, under its name, to be loaded and compressed.
    """
    for name, group in groupby(targets, key=lambda target: target.name):
        same = list(group)
        module = model.get_submodule(name)
        if same[0].kind == "experts":
            add_stacks(module, {target.matrix: layout_of(target) for target in same}, keep_weights)
            continue
        target, bias = same[0], module.bias
        layer = LRQLinear(
            target.in_features,
            target.out_features,
            bias is not None,
            layout_of(target),
            device=module.weight.device,
            dtype=None if bias is None else bias.dtype,
        )
        if keep_weights:
            layer.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
            layer._is_hf_initialized = False  # A head that is not in the checkpoint is initialised as usual.
        model.set_submodule(name, layer)


def install_stack(module: nn.Module, target: Target, matrices: Sequence[CompressedMatrix]) -> None:
    """Put one stack of compressed matrices in the place of the experts' weights."""
    device = module.get_parameter(target.matrix).device
    stack = LRQExpertStack(target.experts, target.in_features, target.out_features, target.spec.layout, device=device)
    for expert, matrix in enumerate(matrices):
        stack.load_matrix(expert, matrix)
    module.add_module(PREFIX + target.matrix, stack)
    delattr(module, target.matrix)
    if not any(matrix in module._parameters for matrix in EXPERT_MATRICES):
        use_stacks(module)


def fill(module: LRQLinear, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Make these the tensors of the module."""
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor.to(device), requires_grad=False))


def plain_linear(placeholder: LRQLinear) -> nn.Linear:
    """The uncompressed layer whose parameters a placeholder holds."""
    has_bias = placeholder.bias is not None
    plain = nn.Linear(placeholder.in_features, placeholder.out_features, has_bias, device="meta")
    plain.weight = nn.Parameter(placeholder.weight.detach())
    if placeholder.bias is not None:
        plain.bias = nn.Parameter(placeholder.bias.detach())
    return plain


def as_conv1d(plain: nn.Linear) -> Conv1D:
    """The transposed linear of GPT-2 that computes the same."""
    with torch.device("meta"):
        transposed = Conv1D(plain.out_features, plain.in_features)
    transposed.weight = nn.Parameter(plain.weight.detach().T.contiguous())
    # Conv1D always has a bias, so no other layer is stored as one.
    transposed.bias = plain.bias
    return transposed


_Module = TypeVar("_Module", bound=nn.Module)


def with_hook_of(old: nn.Module, new: _Module) -> _Module:
    """The new module with the hook by which accelerate moves the inputs of the old one, if any."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
    return new


def check_here(name: str, weight: Tensor) -> None:
    """Raise SpecError if the weight of this module is offloaded."""
    if weight.device.type == "meta":
        raise SpecError(f"{name} is offloaded, so its weight is not at hand. Load the model without offloading.")


def module_of(target: Target) -> str:
    """Name of the module that holds the stored tensors."""
    return f"{target.name}.{PREFIX}{target.matrix}" if target.kind == "experts" else target.name


def tensors_of(target: Target) -> dict[str, TensorLayout]:
    """Full name -> layout of everything stored for a target."""
    stack = (target.experts,) if target.kind == "experts" else ()
    stored = layout_of(target).tensors(target.out_features, target.in_features)
    return {
        f"{module_of(target)}.{name}": TensorLayout((*stack, *tensor.shape), tensor.dtype)
        for name, tensor in stored.items()
    }


def biases_of(model: Any, targets: TargetList, found: Headers) -> dict[str, TensorLayout]:
    """Biases that compressed layers must find; their dtype is that of the uncompressed model, whatever it was."""
    expected = {}
    for target in targets.compressed:
        if target.kind != "experts" and model.get_submodule(target.name).bias is not None:
            key = f"{target.name}.bias"
            expected[key] = TensorLayout((target.out_features,), float_dtype(found.get(key, ("F32", ()))[0]))
    return expected


def stored_modules(name: str, module: nn.Module) -> list[str]:
    """Names of a module and of the compressed stacks it may come to own."""
    stacks = [f"{name}.{PREFIX}{matrix}" for matrix in EXPERT_MATRICES] if has_fused_experts(module) else []
    return [name, *stacks] if is_candidate(module) else []


@dataclass(frozen=True, kw_only=True)
class StoredTarget(Target):
    """A target as a checkpoint holds it.

    Attributes:
        stored: its layout, which may hold more than a spec can ask for.
    """

    stored: LayerLayout


def layout_of(target: Target) -> LayerLayout:
    """How a target is, or will be, stored."""
    return target.stored if isinstance(target, StoredTarget) else target.spec.layout


def stored_targets(name: str, module: Any, header: QuantizationHeader) -> list[StoredTarget]:
    """What a module was before compression, and how it is stored."""
    if has_fused_experts(module):
        shapes = {matrix: getattr(module, matrix).shape for matrix in EXPERT_MATRICES}
        return [
            _stored(name, "experts", (rows, columns), header.layout_for(f"{name}.{PREFIX}{matrix}"), experts, matrix)
            for matrix, (experts, rows, columns) in shapes.items()
        ]
    if is_conv1d(module):
        columns, rows = module.weight.shape
        return [_stored(name, "conv1d", (rows, columns), header.layout_for(name))]
    return [_stored(name, "linear", (module.out_features, module.in_features), header.layout_for(name))]


def _stored(
    name: str, kind: str, shape: tuple[int, int], layout: LayerLayout, experts: int = 1, matrix: str = "weight"
) -> StoredTarget:
    return StoredTarget(
        name=name,
        kind=kind,
        out_features=shape[0],
        in_features=shape[1],
        spec=_spec_of(layout),
        experts=experts,
        matrix=matrix,
        stored=layout,
    )


@dataclass(frozen=True, kw_only=True)
class StoredSpec(LayerSpec):
    """A spec that leads to a layout found in a checkpoint, of which merged adapters may be a part.

    Attributes:
        stored: the layout.
    """

    stored: LayerLayout

    @property
    def layout(self) -> LayerLayout:
        """As found."""
        return self.stored


def _spec_of(layout: LayerLayout) -> StoredSpec:
    book = get_codebook(layout.codebook)
    return StoredSpec(
        stored=layout,
        bits=book.bits,
        rank=layout.rank,
        factor_bits=layout.factor_bits,
        codebook=book.family,
        group_size=layout.group_size,
        rotation=layout.rotation,
        rotation_block=layout.rotation_block,
    )
