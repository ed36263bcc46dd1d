"""The quantization types of llama.cpp, computed by its own library, ggml, and read back by its package `gguf`."""

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.cli.bench.candidates import Compressed, Material, in_file, linear_layers
from hf_lrq.cli.bench.peers.base import Peer
from hf_lrq.errors import LRQError
from hf_lrq.evaluation import Size
from hf_lrq.evaluation.sizes import StoredTensor

# What llama-quantize takes where the width of a matrix is no multiple of the 256 weights of a block.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
SMALLEST_FALLBACK = "IQ4_NL"  # For all types of fewer bits.
# And for the table of a tied head, or a head: of these types Q5_K, of the others Q6_K.
HEAD_IN_Q5_K = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
ACROSS = "+across"
FREE_OF_BLOCKS = 32  # Weights in a block of the types that are no K or I types.
ALIGNMENT = 32  # Bytes, of every tensor in a file.
FIXED_HEADER = 24  # Bytes: magic, version, number of tensors, number of metadata.


@dataclass(frozen=True)
class LlamaCpp(Peer):
    """One type for every linear layer, with an importance matrix; embeddings and head as llama-quantize has them.

    The mixes that llama.cpp offers under these names give a few matrices more bits; this is the type alone. Norms and
    biases are float32. The vocabulary, which a GGUF file holds as well, is not counted. Where the width of a matrix is
    no multiple of a block, the type is the one that llama-quantize falls back to. With "+across" blocks run over the
    ends of rows instead: llama.cpp cannot compute with such matrices, it shows what the type itself can do.
    """

    by = "gguf"
    variants = (
        "iq1_m",
        "iq2_xxs",
        "iq2_xs",
        "iq2_s",
        "q2_k",
        "iq3_xxs",
        "iq3_s",
        "q3_k",
        "iq4_xs",
        "iq4_nl",
        "q4_0",
        "q4_k",
        "q5_0",
        "q5_k",
        "q6_k",
        "q8_0",
    )

    @classmethod
    def knows(cls, variant: str) -> bool:
        """Whether there is such a type; "+across" may follow."""
        return variant.removesuffix(ACROSS) in cls.variants

    def missing(self, material: Material) -> str | None:
        """Whether the library and the package are there."""
        if not find_spec("gguf"):
            return 'the package gguf is not installed. Run: pip install "hf_lrq[gguf]"'
        if material.ggml is None:
            return (
                "ggml's shared library was not named. Give --ggml the file or a folder with it; one way to get it is "
                "npm install @node-llama-cpp/linux-x64"
            )
        return None if _library_in(material.ggml) else f"{material.ggml} holds no libggml-base"

    def libraries(self) -> Sequence[str]:
        """What reads the types back."""
        return ("gguf",)

    def prepare(self, material: Material) -> float:
        """The importance matrix."""
        return material.mean_squares.seconds

    @torch.no_grad()
    def compress(self, model: Any, material: Material) -> Compressed:
        """Round linear layers, embeddings and head."""
        assert material.ggml is not None, "missing() was asked"
        ggml = Ggml(material.ggml)
        wanted, across = self.variant.removesuffix(ACROSS).upper(), self.variant.endswith(ACROSS)
        importance = material.mean_squares.values
        written: dict[str, StoredTensor] = {}
        types: Counter[str] = Counter()

        def put(name: str, module: nn.Module, kind: str, type_: str, weights: Tensor | None, across: bool) -> None:
            W: Tensor = module.weight  # type: ignore[assignment]
            ending = type_ if across else ggml.type_for(type_, W.shape[1])
            packed = ggml.quantize(W.cpu(), ending, weights)
            W.copy_(ggml.dequantize(packed, ending).view(W.shape))
            types[ending] += W.numel()
            written[f"{name}.weight"] = StoredTensor(f"{name}.weight", "U8", (packed.numel(),), kind, W.numel())

        for name, layer in linear_layers(model):
            # Types of two bits cannot do without: where nothing was seen, all columns count the same.
            weights = importance.get(name, torch.ones(layer.in_features))
            put(name, layer, "compressed", wanted, weights, across)
        table_type = wanted if wanted == "Q8_0" else "Q5_K" if wanted in HEAD_IN_Q5_K else "Q6_K"
        for name, module, kind in _tables(model):
            put(name, module, kind, table_type, None, False)
        replaced = {name: [tensor] for name, tensor in written.items()}
        tensors = in_file(model, torch.float32, replaced)
        shapes = {name: tuple(model.get_parameter(name).shape) for name in written}
        size = replace(Size.of(tensors), header_bytes=_header_bytes(tensors, shapes))
        return Compressed(size, {"weights_by_type": dict(types)})


class Ggml:
    """Two functions of ggml: a matrix to blocks of a type, and back.

    Args:
        place: the shared library, or a folder with it.

    Raises:
        LRQError: if it cannot be loaded.
    """

    def __init__(self, place: Path):
        found = _library_in(place)
        try:
            self._quantize = ctypes.CDLL(str(found)).ggml_quantize_chunk
        except (OSError, AttributeError) as error:
            raise LRQError(f"{found} cannot be used as the library ggml: {error}.") from None
        whole, address = ctypes.c_int64, ctypes.c_void_p
        self._quantize.argtypes = [ctypes.c_int, address, address, whole, whole, whole, address]
        self._quantize.restype = ctypes.c_size_t
        self._gguf = import_module("gguf")

    def type_for(self, wanted: str, width: int) -> str:
        """The type, or the one in its place for matrices of this width.

        Raises:
            LRQError: if there is none.
        """
        if width % self._block(wanted)[0] == 0:
            return wanted
        instead = FALLBACK.get(wanted, SMALLEST_FALLBACK)
        if width % self._block(instead)[0]:
            raise LRQError(f"matrices of width {width} cannot be {wanted}, nor {instead} in its place.")
        return instead

    def quantize(self, W: Tensor, type_: str, importance: Tensor | None) -> Tensor:
        """Blocks [bytes] uint8 of a float32 matrix [out, in] on the CPU, in the order of its entries.

        Args:
            W: whose number of entries is a multiple of the block.
            type_: name of it, in capitals.
            importance: [in], of the squared error in each column; None is the same for all.

        Raises:
            LRQError: if ggml writes another number of bytes than the type has.
        """
        block, size = self._block(type_)
        rows = _rows_in_one(W, block)
        W = W.contiguous().view(-1, rows * W.shape[1])
        weights = None if importance is None else importance.float().repeat(rows).contiguous()
        packed = torch.zeros(W.numel() // block * size, dtype=torch.uint8)
        number = int(self._gguf.GGMLQuantizationType[type_])
        address = None if weights is None else weights.data_ptr()
        written = self._quantize(number, W.data_ptr(), packed.data_ptr(), 0, *W.shape, address)
        if written != packed.numel():
            raise LRQError(f"ggml wrote {written} bytes of {type_}, expected {packed.numel()}. Is it too new or old?")
        return packed

    def dequantize(self, packed: Tensor, type_: str) -> Tensor:
        """[entries] float32."""
        kind = self._gguf.GGMLQuantizationType[type_]
        # A copy: the package may return a view of something that numpy may not write to.
        return torch.tensor(self._gguf.quants.dequantize(packed.numpy(), kind)).flatten()

    def _block(self, type_: str) -> tuple[int, int]:
        block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType[type_]]
        return block, size


def _rows_in_one(W: Tensor, block: int) -> int:
    """How many rows have to be one for it to be whole blocks.

    Raises:
        LRQError: if the matrix is none.
    """
    rows = next(count for count in range(1, block + 1) if count * W.shape[1] % block == 0)
    if len(W) % rows:
        raise LRQError(f"{tuple(W.shape)} weights are not blocks of {block} over {rows} rows each.")
    return rows


def _tables(model: Any) -> list[tuple[str, nn.Module, str]]:
    """(name, module, kind) of embeddings and of a head of its own."""
    head = model.get_output_embeddings()
    found: list[tuple[str, nn.Module, str]] = [
        (name, module, "embeddings") for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    ]
    tied = any(head is not None and head.weight is module.weight for _, module, _ in found)
    if head is not None and not tied:
        found += [(name, module, "linears") for name, module in model.named_modules() if module is head]
    return found


def _header_bytes(tensors: Sequence[StoredTensor], shapes: dict[str, tuple[int, ...]]) -> int:
    """What a GGUF file holds beside the values, but for the vocabulary: descriptions of tensors, and padding."""
    # Each is its name with a length, the number of axes, the axes, the type and the offset.
    described = sum(8 + len(t.name) + 4 + 8 * len(shapes.get(t.name, t.shape)) + 4 + 8 for t in tensors)
    padding = sum(ceil(t.bytes / ALIGNMENT) * ALIGNMENT - t.bytes for t in tensors)
    return FIXED_HEADER + ceil(described / ALIGNMENT) * ALIGNMENT + padding


def _library_in(place: Path) -> Path | None:
    """The shared library, itself or below a folder."""
    if place.is_file():
        return place
    found = sorted(place.rglob("libggml-base.*")) + sorted(place.rglob("ggml-base.dll"))
    return found[0] if found else None
