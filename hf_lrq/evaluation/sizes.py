"""Exact size of a model on disk, from its tensors' names, shapes and dtypes: what compression really saves."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from hf_lrq.codebooks import packed_bits
from hf_lrq.layout import TENSOR_NAMES, LayerLayout
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.work import Site

KINDS = ("compressed", "linears", "embeddings", "norms", "other")
# Bits per value of safetensors' dtypes, in the order in which it writes tensors of different dtypes.
_BITS = {
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F32": 32,
    "U32": 32,
    "I32": 32,
    "BF16": 16,
    "F16": 16,
    "U16": 16,
    "I16": 16,
    "F8_E8M0": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "F6_E3M2": 6,
    "F6_E2M3": 6,
    "F4": 4,
    "BOOL": 8,
}
_POSITION = {name: position for position, name in enumerate(_BITS)}
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # Name -> (safetensors dtype, shape).


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        name, dtype, shape: as in a safetensors header; the dtype is a name such as "BF16".
        kind: one of `KINDS`.
        weights: numbers of the original model it stands for; scales, rotations and factors stand for none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    weights: int

    @property
    def bytes(self) -> int:
        """In the file."""
        return _bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Part:
    """Some tensors of a model.

    Attributes:
        weights: numbers of the original model they stand for.
        bytes: stored.
    """

    weights: int = 0
    bytes: int = 0

    @property
    def bits_per_weight(self) -> float | None:
        """8 * bytes / weights, or None where there are no weights."""
        return 8 * self.bytes / self.weights if self.weights else None

    def __add__(self, other: "Part") -> "Part":
        return Part(self.weights + other.weights, self.bytes + other.bytes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"weights": self.weights, "bytes": self.bytes, "bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True)
class Size:
    """Where the bytes of a model are.

    Attributes:
        compressed: codes with padding, scales, rotations and factors of the compressed layers; not their biases.
        linears: uncompressed matrices other than embeddings.
        embeddings: a head tied to them included, as it is stored once.
        norms: weights of normalisation layers.
        other: biases, buffers, and what else there is.
        header_bytes: of safetensors.
        file_bytes: measured size of all files, or None for a model in memory.
    """

    compressed: Part
    linears: Part
    embeddings: Part
    norms: Part
    other: Part
    header_bytes: int
    file_bytes: int | None = None

    @classmethod
    def of(cls, tensors: Iterable[StoredTensor], file_bytes: int | None = None) -> "Size":
        """Add up the tensors of a model."""
        tensors = list(tensors)
        parts = dict.fromkeys(KINDS, Part())
        for tensor in tensors:
            parts[tensor.kind] += Part(tensor.weights, tensor.bytes)
        return cls(**parts, header_bytes=header_bytes(tensors), file_bytes=file_bytes)

    @property
    def tensors(self) -> Part:
        """Everything but the header."""
        return sum((getattr(self, kind) for kind in KINDS), Part())

    @property
    def all_linears(self) -> Part:
        """Compressed and uncompressed matrices, embeddings excluded."""
        return self.compressed + self.linears

    @property
    def predicted_bytes(self) -> int:
        """Of one safetensors file with these tensors."""
        return self.tensors.bytes + self.header_bytes

    @property
    def total_bytes(self) -> int:
        """Measured where there is a file, predicted otherwise."""
        return self.predicted_bytes if self.file_bytes is None else self.file_bytes

    @property
    def bits_per_weight(self) -> float | None:
        """Of the compressed matrices alone."""
        return self.compressed.bits_per_weight

    @property
    def bits_per_parameter(self) -> float | None:
        """Of the whole file, over all parameters of the original model: embeddings, norms and headers included."""
        return Part(self.tensors.weights, self.total_bytes).bits_per_weight

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, derived figures included."""
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            **{name: part.to_dict() if isinstance(part, Part) else part for name, part in parts.items()},
            "all_linears": self.all_linears.to_dict(),
            "predicted_bytes": self.predicted_bytes,
            "total_bytes": self.total_bytes,
            "parameters": self.tensors.weights,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": self.bits_per_parameter,
        }


def size(model: nn.Module, planned: Mapping[Site, LayerLayout] | None = None) -> Size:
    """Size of a model once it is saved, before or after compression.

    Args:
        model: compressed or not; weights may be on the meta device.
        planned: sites that will be compressed; each counts as its layout says, not as it is now.
    """
    return Size.of(stored_tensors(model, planned))


def size_of_headers(headers: Headers, file_bytes: int | None = None) -> Size:
    """Size of a checkpoint from the headers of its files: kinds are told by name and shape, no model is built.

    Args:
        headers: tensor name -> (safetensors dtype, shape), over all files.
        file_bytes: sum of the sizes of the files.
    """
    return Size.of([*_from_headers(headers)], file_bytes)


def stored_tensors(model: nn.Module, planned: Mapping[Site, LayerLayout] | None = None) -> list[StoredTensor]:
    """Every tensor that saving the model writes; tied ones once."""
    plans = {site.parameter: (site, layout) for site, layout in (planned or {}).items()}
    found: list[StoredTensor] = []
    # Embeddings first: a head tied to them is the same parameter.
    modules = sorted(model.named_modules(), key=lambda item: not isinstance(item[1], nn.Embedding))
    seen: set[int] = set()
    for prefix, module in modules:
        stored = {
            name: tensor
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and name not in module._non_persistent_buffers_set
        }
        for name, tensor in stored.items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            full_name = f"{prefix}.{name}" if prefix else name
            if full_name in plans:
                found += _planned_tensors(*plans[full_name])
                continue
            kind, weights = _kind_and_weights(module, name, tensor)
            found.append(StoredTensor(full_name, dtype_name(tensor.dtype), tuple(tensor.shape), kind, weights))
    return found


def header_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Bytes of the safetensors header of one file that holds `tensors`: its length, its JSON, and padding to 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in sorted(tensors, key=lambda each: (_POSITION.get(each.dtype, 0), each.name)):
        end = offset + tensor.bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(text) + -len(text) % 8


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors, for example "BF16"."""
    return _NAMES.get(dtype, f"U{8 * dtype.itemsize}")


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _BITS.get(dtype, 8) // 8


def _planned_tensors(site: Site, layout: LayerLayout) -> list[StoredTensor]:
    return [
        StoredTensor(
            name, dtype_name(tensor.dtype), tensor.shape, "compressed", site.weights if name.endswith(".weight") else 0
        )
        for name, tensor in site.tensors(layout).items()
    ]


def _kind_and_weights(module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[str, int]:
    weights = tensor.numel() if name in module._parameters else 0
    if isinstance(module, LRQLinear | LRQExpertStack):
        if name not in TENSOR_NAMES:
            return "other", weights
        matrices = module.experts if isinstance(module, LRQExpertStack) else 1
        return "compressed", matrices * module.out_features * module.in_features if name == "weight" else 0
    if isinstance(module, nn.Embedding):
        return "embeddings", weights
    if "norm" in type(module).__name__.lower():
        return "norms", weights
    return ("linears" if tensor.ndim > 1 else "other"), weights


def _from_headers(headers: Headers) -> Iterable[StoredTensor]:
    layers = compressed_layers(headers)
    for name, (dtype, shape) in headers.items():
        prefix, _, last = name.rpartition(".")
        if prefix in layers and last in TENSOR_NAMES:
            kind, weights = "compressed", layers[prefix].weights if last == "weight" else 0
        else:
            kind, weights = _kind_by_name(name, shape), math.prod(shape)
        yield StoredTensor(name, dtype, shape, kind, weights)


def _kind_by_name(name: str, shape: tuple[int, ...]) -> str:
    words = name.lower().split(".")
    if "norm" in name.lower() or any(word.startswith("ln_") for word in words):
        return "norms"
    if len(shape) < 2:
        return "other"
    owner = words[-2] if len(words) > 1 else words[-1]
    return "embeddings" if "embed" in owner or owner in ("wte", "wpe", "shared") else "linears"


@dataclass(frozen=True)
class StoredLayer:
    """A compressed matrix or stack of them, read from headers alone.

    Attributes:
        name: of the module that holds the tensors.
        experts: matrices in the stack, 1 where there is none.
        out_features, in_features: of each; without rotation and factors, in_features is only known up to padding.
        code_bits: bits per weight of the codes.
        rank: of L R.
        factor_bits: 16, 8 or 4; 16 where there are no factors.
        bytes: of all its tensors, bias excluded.
    """

    name: str
    experts: int
    out_features: int
    in_features: int
    code_bits: int
    rank: int
    factor_bits: int
    bytes: int

    @property
    def weights(self) -> int:
        """Numbers of the original model."""
        return self.experts * self.out_features * self.in_features

    @property
    def bits_per_weight(self) -> float:
        """True bits, everything stored included."""
        return 8 * self.bytes / self.weights


def compressed_layers(headers: Headers) -> dict[str, StoredLayer]:
    """Module name -> the compressed matrix it holds, for every module that has codes and scales."""
    found = {}
    for name, (dtype, shape) in headers.items():
        prefix, _, last = name.rpartition(".")
        if last == "weight" and dtype == "U8" and len(shape) in (3, 4) and f"{prefix}.scales" in headers:
            found[prefix] = _layer_from_headers(prefix, headers)
    return found


def _layer_from_headers(prefix: str, headers: Headers) -> StoredLayer:
    own = {name: headers[full] for name in TENSOR_NAMES if (full := f"{prefix}.{name}") in headers}
    *stack, _, tiles, width = own["weight"][1]
    out_features = own["scales"][1][len(stack)]
    bits, padded = packed_bits((tiles, width))
    if "rot_in" in own:
        in_features = own["rot_in"][1][-1]
    elif "lr_R" in own:
        in_features = own["lr_R"][1][-1]
    else:
        in_features = padded
    rank, factor_bits = 0, 16
    if "lr_L" in own:
        dtype, shape = own["lr_L"]
        rank = own["lr_L_scale"][1][-1] if "lr_L_scale" in own else shape[-1]
        factor_bits = {"U8": 4}.get(dtype, _BITS.get(dtype, 16))
    stored = sum(_bytes(dtype, shape) for dtype, shape in own.values())
    return StoredLayer(prefix, stack[0] if stack else 1, out_features, in_features, bits, rank, factor_bits, stored)
