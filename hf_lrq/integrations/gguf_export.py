"""Compressed models as GGUF files for llama.cpp: Q in its blocks Q4_0 or Q8_0, bit for bit, and L R as a LoRA.

Everything else, the tokenizer and the settings of the architecture included, comes from a GGUF file of the original,
as llama.cpp's own converter or anybody else made it.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_lrq.checkpoint import staged_directory
from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import LRQError, SpecError
from hf_lrq.integrations.exportable import linear_layers
from hf_lrq.matrices import Pair
from hf_lrq.nn import LRQLinear

GROUP = 32  # Weights of a block.
TYPES = {"gguf4": "Q4_0", "gguf8": "Q8_0"}  # Codebook -> type of block.
HOW = "codebook='gguf', bits=4 or 8, group_size=32, rotation='none', embedding_bits=16"
# Architectures that keep the rows of q and k in pairs -> ends of the names.
PAIRED = {"llama": {"attn_q.weight": "head_count", "attn_k.weight": "head_count_kv"}}
# Correlation of a compressed matrix with its original, and largest relative difference of vectors.
ALIKE, CLOSE = 0.5, 0.02


Blocks = tuple[str, Tensor]  # Their type, and the bytes of each row.


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        model, adapter: the files; no adapter where no matrix has factors.
        matrices: compressed ones.
        most: largest rank.
    """

    model: Path
    adapter: Path | None
    matrices: int
    most: int


def export_gguf(model: nn.Module, like: str | os.PathLike[str], out: str | os.PathLike[str]) -> Exported:
    """Write a compressed model as `model.gguf` and `lora.gguf` into a folder; llama.cpp takes both with -m and --lora.

    Args:
        model: of transformers, whose compressed layers have the codebook `gguf`, groups of 32, and no rotations.
        like: GGUF file of the original.
        out: directory; made if it does not exist.

    Raises:
        SpecError: if a layer is stored in another way; names it.
        LRQError: if the file is of another model, or lacks a tensor; names it.
        CheckpointError: if `out` is taken.
    """
    if find_spec("gguf") is None:
        raise LRQError('GGUF needs the package gguf, which is not installed. Run: pip install "hf_lrq[gguf]"')
    layers = dict(_layers(model))
    original = _Original(Path(like))
    tensors = {original.tensor(name): layer for name, layer in layers.items()}
    original.check_the_rest(model)
    with staged_directory(out) as staging:
        blocks: dict[str, Blocks] = {}
        pairs: dict[str, Pair] = {}
        for name, layer in tensors.items():
            original.check_alike(name, layer)
            blocks[name] = TYPES[layer.layout.codebook], original.ordered(name, blocks_of(layer))
            L, R = layer.low_rank()
            if L.shape[1]:
                pairs[name] = (original.ordered(name, _as_small_as_it_is(L)), _as_small_as_it_is(R))
        original.write(staging / "model.gguf", blocks)
        if pairs:
            original.write_adapter(staging / "lora.gguf", pairs)
    most = max((pair[1].shape[0] for pair in pairs.values()), default=0)
    return Exported(Path(out) / "model.gguf", Path(out) / "lora.gguf" if pairs else None, len(layers), most)


def blocks_of(layer: LRQLinear) -> Tensor:
    """The blocks of Q, uint8 [out, bytes]: a float16 step, then 32 codes; at 4 bits the second half in high nibbles."""
    book = get_codebook(layer.layout.codebook)
    codes = book.unpack(layer.weight.cpu())[:, : layer.in_features].unflatten(1, (-1, GROUP))
    if book.bits == 4:
        stored = (codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4).to(torch.uint8)
    else:
        stored = (codes - 2 ** (book.bits - 1)).to(torch.int8).view(torch.uint8)
    steps = layer.scales.detach().cpu().unsqueeze(-1).view(torch.uint8)
    return torch.cat((steps, stored), dim=2).flatten(1)


def _layers(model: nn.Module) -> Iterator[tuple[str, LRQLinear]]:
    """The compressed layers, which must all be what a file can hold."""
    for name, module in linear_layers(model, "GGUF", HOW):
        layout = module.layout
        if layout.codebook not in TYPES or layout.group_size != GROUP or layout.rotation != "none":
            raise SpecError(
                f"{name} is stored with codebook {layout.codebook!r}, group_size {layout.group_size} and rotation "
                f"{layout.rotation!r}, which no GGUF file can hold exactly. Compress the model with {HOW}."
            )
        if module.in_features % GROUP:
            raise SpecError(f"{name} has {module.in_features} inputs, which are not whole blocks of {GROUP}.")
        yield name, module


def _as_small_as_it_is(factor: Tensor) -> Tensor:
    """In float16 if that loses nothing, else in float32."""
    factor = factor.detach().float().cpu()
    half = factor.half()
    return half if torch.equal(half.float(), factor) else factor


class _Original:
    """The GGUF file of the original.

    Args:
        path: of it.

    Raises:
        LRQError: if it cannot be read.
    """

    def __init__(self, path: Path):
        self._gguf: Any = import_module("gguf")
        self._path = path
        try:
            self._reader = self._gguf.GGUFReader(path)
            self._architecture: str = self._reader.get_field("general.architecture").contents()
            kind = {name: kind for kind, name in self._gguf.MODEL_ARCH_NAMES.items()}[self._architecture]
            self._names = self._gguf.get_tensor_name_map(kind, self._setting("block_count"))
        except FileNotFoundError:
            raise LRQError(f"There is no file {path}. Give the GGUF file of the original model.") from None
        except (ValueError, KeyError, AttributeError, IndexError) as error:
            raise LRQError(f"{path} cannot be read as a GGUF file of a language model: {error}.") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def _setting(self, name: str) -> int:
        value: int = self._reader.get_field(f"{self._architecture}.{name}").contents()
        return value

    def tensor(self, module: str) -> str:
        """Name of the weight of a module in the file."""
        found = self._names.get_name(module)
        if found is None or f"{found}.weight" not in self._tensors:
            raise LRQError(
                f"{self._path} has no tensor for {module} (looked for {found and found + '.weight'}); it is a file of "
                f"architecture {self._architecture!r}. Give the GGUF file of the model that was compressed."
            )
        return f"{found}.weight"

    def ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a matrix in the order in which the file has them."""
        of_heads = PAIRED.get(self._architecture, {})
        ending = next((ending for ending in of_heads if name.endswith(ending)), None)
        if ending is None:
            return rows
        heads = self._setting(f"attention.{of_heads[ending]}")
        # Halves of a head become pairs: rotary embeddings are written so there.
        return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)

    def check_alike(self, name: str, layer: LRQLinear) -> None:
        """Whether a matrix is a compressed one of the file, its rows in the same order.

        Raises:
            LRQError: if it is not.
        """
        theirs, ours = self._values(name), self.ordered(name, layer.dense().cpu())
        if theirs.shape != ours.shape:
            raise LRQError(f"{name} of {self._path} is {list(theirs.shape)}, the compressed one {list(ours.shape)}.")
        norms = (theirs.norm() * ours.norm()).item()
        likeness = (theirs * ours).sum().item() / norms if norms else 1.0
        if likeness < ALIKE:
            raise LRQError(
                f"{name} of {self._path} is not the original of what was compressed: their correlation is "
                f"{likeness:.2f}. Give the GGUF file of the same model."
            )

    def check_the_rest(self, model: nn.Module) -> None:
        """Whether vectors, which come from the file, are those of the model: recovery trains norms.

        Raises:
            LRQError: if one is not.
        """
        for name, parameter in model.named_parameters():
            stem, _, kind = name.rpartition(".")
            target = self._names.get_name(stem)
            if parameter.ndim != 1 or target is None or (found := f"{target}.{kind}") not in self._tensors:
                continue
            theirs, ours = self._values(found).flatten(), parameter.detach().float().cpu()
            # Some architectures store norms plus one.
            same = theirs.shape == ours.shape
            if not same or min((theirs - ours - more).norm() for more in (0, 1)) > CLOSE * theirs.norm():
                raise LRQError(
                    f"{name} differs from {found} of {self._path}: it was trained after the compression, or belongs to "
                    "another model. Export the model as it was before, or give a GGUF file of what it is now."
                )

    def _values(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return torch.from_numpy(self._gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()

    def write(self, path: Path, blocks: Mapping[str, Blocks]) -> None:
        """The file again, with other blocks for some tensors."""
        writer = self._gguf.GGUFWriter(path, self._architecture)
        types = self._gguf.GGUFValueType
        for field in self._reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
                continue
            inner = field.types[-1] if field.types[0] == types.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
        usual = Counter(kind for kind, _ in blocks.values()).most_common(1)[0][0]
        writer.add_file_type(self._gguf.LlamaFileType[f"MOSTLY_{usual}"])
        for name, tensor in self._tensors.items():
            if name in blocks:
                kind, rows = blocks[name]
                writer.add_tensor(name, rows.numpy(), raw_dtype=self._gguf.GGMLQuantizationType[kind])
            else:
                writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
        _finish(writer)

    def write_adapter(self, path: Path, pairs: Mapping[str, Pair]) -> None:
        """L and R of each tensor as a LoRA that is added as it is."""
        writer = self._gguf.GGUFWriter(path, self._architecture)
        writer.add_type("adapter")
        writer.add_string(self._gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(self._gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # Not 0 would be divided by each rank.
        for name, (L, R) in pairs.items():
            writer.add_tensor(f"{name}.lora_a", R.numpy())
            writer.add_tensor(f"{name}.lora_b", L.numpy())
        _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
