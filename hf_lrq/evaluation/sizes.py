"""Exact size of a model on disk, from its tensors' names, shapes and dtypes: what compression really saves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from hf_lrq.digests import expected_record
from hf_lrq.layout import TENSOR_NAMES, LayerLayout
from hf_lrq.nn import COMPRESSED, LRQEmbedding, LRQExpertStack, LRQHead
from hf_lrq.safetensors_headers import dtype_name, header_bytes, tensor_bytes
from hf_lrq.work import Site

KINDS = ("compressed", "linears", "embeddings", "norms", "other")


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
        return tensor_bytes(self.dtype, self.shape)


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
        compressed: codes with padding, scales, rotations and factors of the compressed layers; not their biases, and
            not what is compressed of embeddings and heads.
        linears: uncompressed matrices other than embeddings.
        embeddings: as numbers or as codes, with scales; a head tied to them included, as it is stored once, and other
            heads where they are codes.
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
        headers = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
        codes = any(tensor.dtype == "U8" for tensor in tensors)
        record = expected_record(headers).to_metadata() if codes else {}
        return cls(
            **parts,
            header_bytes=header_bytes(headers, record),
            file_bytes=file_bytes,
        )

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


def _planned_tensors(site: Site, layout: LayerLayout) -> list[StoredTensor]:
    return [
        StoredTensor(
            name,
            dtype_name(tensor.dtype),
            tensor.shape,
            "embeddings" if site.of_tables else "compressed",
            site.weights if name.endswith(".weight") else 0,
        )
        for name, tensor in site.tensors(layout).items()
    ]


def _kind_and_weights(module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[str, int]:
    weights = tensor.numel() if name in module._parameters else 0
    if isinstance(module, COMPRESSED):
        if name not in TENSOR_NAMES:
            return "other", weights
        matrices = module.experts if isinstance(module, LRQExpertStack) else 1
        kind = "embeddings" if isinstance(module, LRQEmbedding | LRQHead) else "compressed"
        return kind, matrices * module.out_features * module.in_features if name == "weight" else 0
    if isinstance(module, nn.Embedding):
        return "embeddings", weights
    if "norm" in type(module).__name__.lower():
        return "norms", weights
    return ("linears" if tensor.ndim > 1 else "other"), weights
