"""Exact size of a saved model and of its compressed matrices, from the headers of its files; no model is built."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hf_lrq.codebooks import get_codebook
from hf_lrq.evaluation.sizes import Size, StoredTensor
from hf_lrq.layout import TENSOR_NAMES, LayerLayout, TensorLayout
from hf_lrq.nn.fused_experts import PREFIX
from hf_lrq.safetensors_headers import Headers, tensor_bytes


@dataclass(frozen=True)
class StoredLayer:
    """A compressed matrix or stack of them, as the files hold it.

    Attributes:
        name: of the module that holds the tensors.
        layout: of each matrix.
        experts: matrices in the stack, 1 where there is none.
        out_features, in_features: of each; without rotation and factors, in_features is only known up to padding.
        bytes: of all its tensors, bias excluded.
        of_tables: whether it is an embedding or an output head.
    """

    name: str
    layout: LayerLayout
    experts: int
    out_features: int
    in_features: int
    bytes: int
    of_tables: bool = False

    @property
    def weights(self) -> int:
        """Numbers of the original model."""
        return self.experts * self.out_features * self.in_features

    @property
    def rank(self) -> int:
        """Ranks of L R."""
        return self.layout.clamped_rank(self.out_features, self.in_features)

    @property
    def factor_bits(self) -> int:
        """16, 8 or 4; 16 where there are no factors."""
        return self.layout.factor_bits if self.rank else 16

    @property
    def code_bits(self) -> int:
        """Bits per weight of the codes."""
        return get_codebook(self.layout.codebook).bits

    @property
    def bits_per_weight(self) -> float:
        """True bits, everything stored included."""
        return 8 * self.bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        own = ("name", "experts", "out_features", "in_features", "code_bits", "rank", "factor_bits", "bytes")
        return {
            **{key: getattr(self, key) for key in own},
            "codebook": self.layout.codebook,
            "bits_per_weight": self.bits_per_weight,
        }


class Layouts(Protocol):
    """What config.json says of compressed modules; `checkpoint.QuantizationHeader` is one.

    Attributes:
        embeddings: names of compressed embeddings and heads.
    """

    @property
    def embeddings(self) -> tuple[str, ...]: ...

    def layout_for(self, name: str) -> LayerLayout:
        """The layout of a compressed module, by the name it has in the files."""


def compressed_layers(headers: Headers, layouts: Layouts) -> dict[str, StoredLayer]:
    """Module name -> the compressed matrix it holds, for every module that has codes and scales.

    Args:
        headers: of all files.
        layouts: of the compressed modules.
    """
    found = {}
    for name, (dtype, shape) in headers.items():
        prefix, _, last = name.rpartition(".")
        if last == "weight" and dtype == "U8" and len(shape) in (3, 4) and f"{prefix}.scales" in headers:
            found[prefix] = _layer_from_headers(prefix, headers, layouts)
    return found


def _layer_from_headers(prefix: str, headers: Headers, layouts: Layouts) -> StoredLayer:
    layout = layouts.layout_for(prefix)
    own = {name: headers[full] for name in TENSOR_NAMES if (full := f"{prefix}.{name}") in headers}
    *stack, _, tiles, _ = own["weight"][1]
    out_features = own["scales"][1][len(stack)]
    in_features = tiles * get_codebook(layout.codebook).column_block
    for name in ("rot_in", "lr_R", "ft_R"):
        if name in own:
            in_features = own[name][1][-1]
    stored = sum(tensor_bytes(dtype, shape) for dtype, shape in own.values())
    experts = stack[0] if stack else 1
    return StoredLayer(prefix, layout, experts, out_features, in_features, stored, prefix in layouts.embeddings)


def stored_tensors(layers: Iterable[StoredLayer]) -> dict[str, TensorLayout]:
    """Every tensor that the layouts of these matrices call for, by full name; biases excluded."""
    expected = {}
    for layer in layers:
        stack = (layer.experts,) if layer.name.rpartition(".")[2].startswith(PREFIX) else ()
        for tensor, wanted in layer.layout.tensors(layer.out_features, layer.in_features).items():
            expected[f"{layer.name}.{tensor}"] = TensorLayout((*stack, *wanted.shape), wanted.dtype)
    return expected


def size_of_headers(headers: Headers, file_bytes: int | None = None, layouts: Layouts | None = None) -> Size:
    """Size of a checkpoint from the headers of its files: kinds are told by name and shape, no model is built.

    Args:
        headers: of all files.
        file_bytes: sum of the sizes of the files.
        layouts: of the compressed modules; None where nothing is compressed, or not by this library.
    """
    layers = {} if layouts is None else compressed_layers(headers, layouts)
    return Size.of(_from_headers(headers, layers), file_bytes)


def _from_headers(headers: Headers, layers: Mapping[str, StoredLayer]) -> Iterator[StoredTensor]:
    for name, (dtype, shape) in headers.items():
        prefix, _, last = name.rpartition(".")
        if prefix in layers and last in TENSOR_NAMES:
            kind = "embeddings" if layers[prefix].of_tables else "compressed"
            weights = layers[prefix].weights if last == "weight" else 0
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
